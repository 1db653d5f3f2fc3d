"""The names of dtypes, in jaxnet and in safetensors."""

__all__ = ["BITS", "CODES", "DTYPES", "WIDENED"]

# dtype -> the name of the same type in safetensors
CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}

# dtype without such a name -> the type that is stored
WIDENED = {
    # These are stored as the same numbers.
    "int1": "I8",
    "int2": "I8",
    "int4": "I8",
    "uint1": "U8",
    "uint2": "U8",
    "uint4": "U8",
    # These are stored as their bits, one element per byte.
    "float8_e3m4": "U8",
    "float8_e4m3": "U8",
    "float8_e4m3b11fnuz": "U8",
    "float6_e2m3fn": "U8",
    "float6_e3m2fn": "U8",
    "float4_e2m1fn": "U8",
    # The real and the imaginary part lie along one more axis.
    "complex128": "F64",
}

# The bits of one element of each type in safetensors.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
