"""The arithmetic on W: one definition, and a backend for each kind of device."""
