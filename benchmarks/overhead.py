"""What a framework adds around the arithmetic of a network: to its trace, its initialization and a
call without jit.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --row trace --row "init again" --only Linen

The network is 24 transformer blocks of width 64 on 8 sequences of 16 tokens: unrolled, and as one
loop over stacked parameters (`repeat`, `lax.scan`, `nn.scan`, `nnx.scan`, `layer_stack`, a scan
over vmapped modules). The attention is one function of raw operations that all share. Before the
clock starts, every competitor computes the output of the hand-written network from the same
weights, and has as many of them. A first init is measured in processes of its own; all else in one
warm process, with a definition and a jitted function that are new for each sample.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from measure import Row, Table
from startup import child

# pyright: reportMissingImports=false

WIDTH, HIDDEN, HEADS, TOKENS, BATCH = 64, 256, 4, 16, 8
BLOCKS = 24
FORMS = ("unrolled", "scanned")
REFERENCE = "JAX by hand"
SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}


@dataclasses.dataclass
class Network:
    """One definition of the network. `init` gives a tree of arrays, `apply` takes that tree; both
    are pure.
    """

    init: Callable[[Any, Any], Any]
    apply: Callable[[Any, Any], Any]


# (form, blocks) -> a function that defines a new network.
Library = Callable[[str, int], Callable[[], Network]]


def attention(qkv):
    """Softmax attention of HEADS heads on the projections [..., T, 3 * WIDTH] -> [..., T,
    WIDTH].
    """
    q, k, v = jnp.split(qkv.reshape(*qkv.shape[:-1], HEADS, -1), 3, axis=-1)
    scores = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(WIDTH // HEADS))
    return jnp.einsum("...hqk,...khd->...qhd", scores, v).reshape(*qkv.shape[:-1], WIDTH)


def main(argv=None):
    options = measure.arguments(__doc__, rounds=9, seconds=60, add=add_flags, argv=argv)
    jax.config.update("jax_enable_compilation_cache", False)
    libraries, resnets = (
        {name: x for name, x in every.items() if name == REFERENCE or measure.wanted(name, options)}
        for every in (LIBRARIES, RESNETS)
    )
    tables = []
    for operation, sample in OPERATIONS.items():
        for form in FORMS:
            if asked_for(title := f"{operation}, {form}", options):
                print(title, "...", file=sys.stderr, flush=True)
                prepare = functools.partial(
                    prepared, sample=sample, form=form, blocks=options.blocks
                )
                tables.append(table(title, libraries, prepare, options))
    if asked_for(title := "first init, ResNet-50", options):
        tables.append(
            table(title, resnets, lambda name, _: functools.partial(first_resnet, name), options)
        )
    measure.publish(options, *tables, text=text_of(tables, options.blocks))


def add_flags(parser):
    parser.add_argument(
        "--blocks", type=int, default=BLOCKS, help="how many blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--row", action="append", metavar="NAME", help="those rows with this in the name"
    )


def asked_for(title: str, options) -> bool:
    return not options.row or any(part.lower() in title.lower() for part in options.row)


# Samples: each function takes a library's definition, and gives a function that does the work once
# and returns its CPU and wall seconds.


def prepared(
    name: str, library: Library, *, sample: Callable, form: str, blocks: int
) -> Callable[[], tuple]:
    """A sample of one competitor, after its network has given the right output."""
    if sample is first_init:
        return functools.partial(first_init, name, form, blocks)
    return functools.partial(sample, checked(library, form, blocks), jax.random.key(0), inputs())


@functools.cache
def checked(library: Library, form: str, blocks: int) -> Callable[[], Network]:
    """What defines the network in a library, if it has the weights of the hand-written one and
    gives its output.
    """
    define, x = library(form, blocks), inputs()
    network = define()
    params = network.init(jax.random.key(0), x)
    sizes = sum(a * b + b for a, b in SHAPES.values()) + 4 * WIDTH
    if (count := sum(leaf.size for leaf in jax.tree.leaves(params))) != blocks * sizes:
        raise ValueError(f"the network has {count} parameters, expected {blocks * sizes}")
    by_hand = hand("unrolled", blocks)()
    expected = by_hand.apply(filled(by_hand.init(jax.random.key(0), x), blocks), x)
    measure.check(network.apply(filled(params, blocks), x), expected, 1e-4)
    return define


def filled(params: Any, blocks: int) -> Any:
    """The same weights for every library: each entry follows from its indices, and is the same in a
    transpose.
    """

    def leaf(a):
        shape = a.shape[1:] if a.ndim > 1 and a.shape[0] == blocks else a.shape
        i, j = (np.arange(n, dtype=np.float32) for n in (shape if len(shape) == 2 else (*shape, 1)))
        values = 0.1 * np.cos(np.outer(i + 1, j + 1)) if len(shape) == 2 else 0.5 + 0.1 * np.cos(i)
        return jnp.asarray(np.broadcast_to(values, a.shape), a.dtype)

    return jax.tree.map(leaf, params)


def inputs() -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(run())
    return time.process_time() - cpu, time.perf_counter() - wall


def trace_apply(define, key, x):
    network = define()
    params = jax.eval_shape(network.init, key, x)
    return timed(lambda: jax.jit(lambda params, x: network.apply(params, x)).lower(params, x))


def trace_grad(define, key, x):
    network = define()
    params = jax.eval_shape(network.init, key, x)
    loss = jax.grad(lambda params, x: jnp.mean(network.apply(params, x) ** 2))
    return timed(lambda: jax.jit(loss).lower(params, x))


def init_again(define, key, x):
    return timed(lambda: define().init(key, x))


def jit_init(define, key, x):
    network = define()
    return timed(lambda: jax.jit(lambda key, x: network.init(key, x))(key, x))


def eval_shape_init(define, key, x):
    network = define()
    return timed(lambda: jax.eval_shape(lambda key, x: network.init(key, x), key, x))


def eager_apply(define, key, x):
    network = define()
    params = jax.block_until_ready(network.init(key, x))
    return timed(lambda: network.apply(params, x))


def first_init(name: str, form: str, blocks: int) -> tuple[float, float]:
    return in_a_new_process(f"LIBRARIES[{name!r}]({form!r}, {blocks})", "inputs()")


def first_resnet(name: str) -> tuple[float, float]:
    return in_a_new_process(f"RESNETS[{name!r}]()", "jnp.zeros((1, 224, 224, 3))")


def in_a_new_process(define: str, x: str) -> tuple[float, float]:
    """CPU and wall seconds of the first init, after everything has been imported and the backend
    has been started.
    """
    code = "from overhead import *; jax.config.update('jax_enable_compilation_cache', False); "
    code += (
        f"define, x, key = {define}, {x}, jax.random.key(0); print(*timed(lambda: "
        "define().init(key, x)))"
    )
    cpu, wall = map(float, child(code).split())
    return cpu, wall


OPERATIONS = {
    "trace of apply": trace_apply,
    "trace of grad": trace_grad,
    "first init": first_init,
    "init again": init_again,
    "jit(init)": jit_init,
    "eval_shape(init)": eval_shape_init,
    "eager apply": eager_apply,
}


def table(title: str, competitors: Mapping[str, Any], prepare: Callable, options) -> Table:
    """The rows of one operation: all competitors in turns, CPU seconds and ratios, wall ratios
    beside them.
    """
    rows = [Row(name, others={"wall ratio": []}) for name in competitors]
    samples = {}
    for row in rows:
        with measure.problems_of(row):
            sample = prepare(row.name, competitors[row.name])
            # What a process does only once is not what is measured here, except in the processes of
            # a first init.
            if "first" not in title:
                sample()
            samples[row.name] = sample
    start = time.perf_counter()
    for done in range(options.rounds):
        if done and time.perf_counter() - start > options.seconds:
            break
        taken = {}
        for row in rows:
            if not row.problem:
                with measure.problems_of(row):
                    taken[row.name] = samples[row.name]()
        base = taken.get(REFERENCE)
        for row in rows:
            if base and row.name in taken:
                cpu, wall = taken[row.name]
                row.seconds.append(cpu)
                row.ratios.append(cpu / base[0])
                row.others["wall ratio"].append(wall / base[1])
    return Table(title, "call", "ms", REFERENCE, rows)


def text_of(tables: list[Table], blocks: int) -> str:
    """All tables as two: a line for each operation, a column for each library."""
    names = list(
        dict.fromkeys(row.name for table in tables for row in table.rows if row.name != REFERENCE)
    )
    parts = [
        (
            f"{blocks} transformer blocks of width {WIDTH} on {BATCH} x {TOKENS} tokens; a "
            "ResNet-50 of width 16"
        )
    ]
    for kind in ("CPU", "wall"):
        lines = [["", f"{REFERENCE}, ms" if kind == "CPU" else "", *names, "rounds"]]
        for table in tables:
            rows = {row.name: row for row in table.rows}
            base = (
                measure.digits(1e3 * measure.quartiles(rows[REFERENCE].seconds)[1])
                if kind == "CPU"
                else ""
            )
            cells = [cell(rows[name], kind) if name in rows else "" for name in names]
            lines.append([table.title, base, *cells, str(len(rows[REFERENCE].seconds))])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        body = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        parts += [
            "",
            f"{kind} time as a ratio to {REFERENCE}, round by round: median [quartiles]",
            "",
            *body,
        ]
    problems = {
        f"{row.name}: {row.problem}": None for table in tables for row in table.rows if row.problem
    }
    return "\n".join([*parts, *([""] if problems else []), *problems])


def cell(row: Row, kind: str) -> str:
    if row.problem:
        return row.problem.split(":")[0]
    ratios = row.ratios if kind == "CPU" else row.others["wall ratio"]
    low, median, high = (measure.digits(x) for x in measure.quartiles(ratios))
    return f"{median} [{low}, {high}]"


# The network in each library: (form, blocks) -> a function that defines it anew.


def hand(form: str, blocks: int) -> Callable[[], Network]:
    kernel_init = jax.nn.initializers.lecun_normal()

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def block(p, x):
        x = x + dense(p["out"], attention(dense(p["qkv"], norm(p["norm1"], x))))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm2"], x))))

    def init_block(key, dtype):
        keys = jax.random.split(key, len(SHAPES))
        params = {
            name: {"kernel": kernel_init(k, shape, dtype), "bias": jnp.zeros(shape[1], dtype)}
            for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
        }
        vectors = {"scale": jnp.ones(WIDTH, dtype), "bias": jnp.zeros(WIDTH, dtype)}
        return params | {"norm1": vectors, "norm2": vectors}

    def define():
        def init(key, x):
            keys = jax.random.split(key, blocks)
            make = functools.partial(init_block, dtype=x.dtype)
            return jax.vmap(make)(keys) if form == "scanned" else [make(k) for k in keys]

        def apply(params, x):
            if form == "scanned":
                return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]
            for p in params:
                x = block(p, x)
            return x

        return Network(init, apply)

    return define


def jaxnet(form: str, blocks: int) -> Callable[[], Network]:
    from jaxnet import chain, dense, layer_norm, repeat, wire

    def block():
        @wire(
            norm1=layer_norm(),
            qkv=dense(3 * WIDTH),
            out=dense(WIDTH),
            norm2=layer_norm(),
            up=dense(HIDDEN),
            down=dense(WIDTH),
        )
        def block(f, x):
            x = x + f.out(attention(f.qkv(f.norm1(x))))
            return x + f.down(jax.nn.gelu(f.up(f.norm2(x))))

        return block

    def define():
        net = (
            repeat(block(), blocks)
            if form == "scanned"
            else chain(*(block() for _ in range(blocks)))
        )
        return Network(net.init, net.apply)

    return define


def linen(form: str, blocks: int) -> Callable[[], Network]:
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(3 * WIDTH)(nn.LayerNorm(epsilon=1e-5)(x))
            x = x + nn.Dense(WIDTH)(attention(h))
            h = nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm(epsilon=1e-5)(x)))
            return x + nn.Dense(WIDTH)(h)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Block()(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if form == "scanned":
                axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
                return nn.scan(Step, **axes, length=blocks)()(x, None)[0]
            for _ in range(blocks):
                x = Block()(x)
            return x

    def define():
        net = Net()
        return Network(net.init, net.apply)

    return define


def equinox(form: str, blocks: int) -> Callable[[], Network]:
    import equinox as eqx

    class Block(eqx.Module):
        norm1: Any
        qkv: Any
        out: Any
        norm2: Any
        up: Any
        down: Any

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            layers = [
                eqx.nn.Linear(*shape, key=k) for k, shape in zip(keys, SHAPES.values(), strict=True)
            ]
            self.qkv, self.out, self.up, self.down = layers
            self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)

        def __call__(self, x):
            h = attention(jax.vmap(self.qkv)(jax.vmap(self.norm1)(x)))
            x = x + jax.vmap(self.out)(h)
            h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
            return x + jax.vmap(self.down)(h)

    class Net(eqx.Module):
        blocks: Any

        def __init__(self, key):
            keys = jax.random.split(key, blocks)
            self.blocks = (
                eqx.filter_vmap(Block)(keys) if form == "scanned" else [Block(k) for k in keys]
            )

        def __call__(self, x):
            if form == "scanned":
                arrays, static = eqx.partition(self.blocks, eqx.is_array)
                return jax.lax.scan(lambda x, p: (eqx.combine(p, static)(x), None), x, arrays)[0]
            for block in self.blocks:
                x = block(x)
            return x

    def define():
        static: Any = None

        def init(key, x):
            nonlocal static
            arrays, static = eqx.partition(Net(key), eqx.is_array)
            return arrays

        return Network(init, lambda params, x: jax.vmap(eqx.combine(params, static))(x))

    return define


def nnx(form: str, blocks: int) -> Callable[[], Network]:
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            layers = [nnx.Linear(*shape, rngs=rngs) for shape in SHAPES.values()]
            self.qkv, self.out, self.up, self.down = layers
            self.norm1, self.norm2 = (
                nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs) for _ in range(2)
            )

        def __call__(self, x):
            x = x + self.out(attention(self.qkv(self.norm1(x))))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Net(nnx.Module):
        blocks: Any

        def __init__(self, rngs):
            if form == "scanned":
                make = nnx.vmap(lambda rngs: Block(rngs), in_axes=0, out_axes=0)
                self.blocks = nnx.split_rngs(splits=blocks)(make)(rngs)
            else:
                self.blocks = nnx.List([Block(rngs) for _ in range(blocks)])

        def __call__(self, x):
            if form == "scanned":
                return nnx.scan(
                    lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
                )(x, self.blocks)
            for block in self.blocks:
                x = block(x)
            return x

    def define():
        static: Any = None

        def init(key, x):
            nonlocal static
            static, arrays = nnx.split(Net(nnx.Rngs(params=key)))
            return arrays

        return Network(init, lambda params, x: nnx.merge(static, params)(x))

    return define


def haiku(form: str, blocks: int) -> Callable[[], Network]:
    import haiku as hk
    from haiku.experimental import layer_stack

    def block(x):
        def norm():
            return hk.LayerNorm(-1, create_scale=True, create_offset=True)

        x = x + hk.Linear(WIDTH)(attention(hk.Linear(3 * WIDTH)(norm()(x))))
        return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(HIDDEN)(norm()(x))))

    def forward(x):
        if form == "scanned":
            return layer_stack(blocks)(block)(x)
        for _ in range(blocks):
            x = block(x)
        return x

    def define():
        net = hk.without_apply_rng(hk.transform(lambda x: forward(x)))
        return Network(net.init, net.apply)

    return define


LIBRARIES: dict[str, Library] = {
    REFERENCE: hand,
    "jaxnet": jaxnet,
    "Flax Linen": linen,
    "Equinox": equinox,
    "Haiku": haiku,
    "Flax NNX": nnx,
}


# ResNet-50 of width 16 (its bottlenecks have 16, 32, 64 and 128 features, times four at their end),
# of which only init is measured.

STAGES = [(16, 3, 1), (32, 4, 2), (64, 6, 2), (128, 3, 2)]  # features, blocks, stride of the first


def hand_resnet() -> Callable[[], Network]:
    kernel_init = jax.nn.initializers.lecun_normal()

    def shapes():
        yield 7, 3, 16
        channels = 16
        for features, blocks, _ in STAGES:
            for i in range(blocks):
                yield from [
                    (1, channels, features),
                    (3, features, features),
                    (1, features, 4 * features),
                ]
                if i == 0:
                    yield 1, channels, 4 * features
                channels = 4 * features

    def init(key, x):
        layers = list(shapes())
        params = {}
        for i, (k, (window, channels, features)) in enumerate(
            zip(jax.random.split(key, len(layers)), layers, strict=True)
        ):
            kernel = kernel_init(k, (window, window, channels, features), x.dtype)
            norm = {name: jnp.ones(features, x.dtype) for name in ("scale", "var")}
            norm |= {name: jnp.zeros(features, x.dtype) for name in ("bias", "mean")}
            params[f"conv{i}"] = {"kernel": kernel} | norm
        head = kernel_init(key, (512, 1000), x.dtype)
        return params | {"head": {"kernel": head, "bias": jnp.zeros(1000, x.dtype)}}

    return lambda: Network(init, lambda params, x: x)


def jaxnet_resnet(repeated: bool) -> Callable[[], Network]:
    from jaxnet import batch_norm, chain, conv, dense, global_avg_pool, max_pool, parallel, repeat

    def normed(features, window, strides=1):
        return chain(conv(features, window, strides=strides, bias=False), batch_norm())

    def bottleneck(features, strides=1, project=False):
        body = [
            normed(features, 1),
            jax.nn.relu,
            normed(features, 3, strides),
            jax.nn.relu,
            normed(4 * features, 1),
        ]
        skip = normed(4 * features, 1, strides) if project else lambda x: x
        return chain(parallel(chain(*body), skip, merge=lambda a, b: jax.nn.relu(a + b)))

    def define():
        stages = []
        for features, blocks, strides in STAGES:
            rest = [bottleneck(features) for _ in range(1 if repeated else blocks - 1)]
            rest = [repeat(rest[0], blocks - 1)] if repeated else rest
            stages.append(chain(bottleneck(features, strides, project=True), *rest))
        stem = [normed(16, 7, 2), jax.nn.relu, max_pool(3, strides=2, padding=1)]
        net = chain(*stem, *stages, global_avg_pool(), dense(1000))
        return Network(lambda key, x: (net.init(key, x), net.init_state(x)), lambda params, x: x)

    return define


def linen_resnet() -> Callable[[], Network]:
    from flax import linen as nn

    class Normed(nn.Module):
        features: int
        window: int
        strides: int = 1

        @nn.compact
        def __call__(self, x):
            window, strides = (self.window,) * 2, (self.strides,) * 2
            return nn.BatchNorm(use_running_average=True)(
                nn.Conv(self.features, window, strides, use_bias=False)(x)
            )

    class Bottleneck(nn.Module):
        features: int
        strides: int = 1
        project: bool = False

        @nn.compact
        def __call__(self, x):
            h = nn.relu(Normed(self.features, 1)(x))
            h = Normed(4 * self.features, 1)(nn.relu(Normed(self.features, 3, self.strides)(h)))
            return nn.relu(
                h + (Normed(4 * self.features, 1, self.strides)(x) if self.project else x)
            )

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(Normed(16, 7, 2)(x)), (3, 3), (2, 2), "SAME")
            for features, blocks, strides in STAGES:
                for i in range(blocks):
                    x = Bottleneck(features, 1 if i else strides, project=not i)(x)
            return nn.Dense(1000)(x.mean((1, 2)))

    def define():
        net = ResNet()
        return Network(net.init, lambda params, x: x)

    return define


RESNETS: dict[str, Callable[[], Callable[[], Network]]] = {
    REFERENCE: hand_resnet,
    "jaxnet": functools.partial(jaxnet_resnet, False),
    "jaxnet, repeat": functools.partial(jaxnet_resnet, True),
    "Flax Linen": linen_resnet,
}

if __name__ == "__main__":
    main()
