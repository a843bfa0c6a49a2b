"""Numbers of tokens as people write them."""

UNITS = {"K": 1, "M": 2, "B": 3, "G": 3, "T": 4}


def parse_count(text: str, thousand: int) -> int:
    """A number with K, M, B, G or T behind it, each so many times the one before.

    Raises:
        ValueError: if it is none.
    """
    unit = UNITS.get(text[-1:].upper(), 0)
    try:
        number = float(text[:-1] if unit else text) * thousand**unit
        if number < 1:
            raise ValueError
        return round(number)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a number such as 500000 or 4M") from None


def count_windows(batch: int, sequence: int) -> int:
    """Windows of a batch of so many tokens.

    Raises:
        ValueError: if they are not whole.
    """
    windows, rest = divmod(batch, sequence)
    if rest or not windows:
        near = sequence * max(1, round(batch / sequence))
        raise ValueError(
            f"a batch of {batch:,} tokens / windows of {sequence:,} = "
            f"{batch / sequence:.2f} windows; {near:,} tokens would do"
        )
    return windows
