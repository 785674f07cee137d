"""Live inside other people's programs; each plugin is imported by name, since each needs a host of its own."""

__all__: list[str] = []
