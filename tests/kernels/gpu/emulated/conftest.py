"""The launcher imports the emulator, which most machines have not: only the tests that check for it may import it."""

collect_ignore = ["gfx942.py"]
