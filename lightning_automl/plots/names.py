"""Names of classes, short enough to leave room for a picture."""

#: Characters that leave half of a figure to the picture on a phone.
LONGEST = 22


def shorten(name: str, longest: int = LONGEST) -> str:
    """Leave out the middle of a long name; kinds of one disease often begin alike and end differently."""
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"
