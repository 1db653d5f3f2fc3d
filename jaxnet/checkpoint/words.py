"""Text for people: names come from files and may hold anything, errors and terminals shall not."""

MOST = 50_000  # characters of an error: some hundred lines


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for control characters, marks that turn the direction, and lone surrogates, except `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(name: object, most: int = 300) -> str:
    """A name on one line, of a length that leaves room for others."""
    text = str(name)
    half = most // 2
    return printable(text if len(text) <= most else f"{text[:half]}...{text[-half:]}")


def bounded(text: str) -> str:
    """Several lines, printable, without those and those ends of lines that are too much for an error."""
    lines, left, size = text.split("\n"), [], 0
    for line in lines:
        left.append(shown(line, 3000))
        size += len(left[-1])
        if size > MOST:
            break
    if len(lines) > len(left):
        left.append(f"  ... and {len(lines) - len(left):,} more lines")
    return "\n".join(left)
