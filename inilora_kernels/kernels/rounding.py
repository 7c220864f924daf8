"""How sizes are rounded up to what a kernel accepts."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`.

    >>> round_up(1, 16), round_up(16, 16), round_up(17, 16)
    (16, 16, 32)
    """
    return -(-value // multiple) * multiple
