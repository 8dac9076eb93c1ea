def build_info() -> dict[str, str]:
    """Versions and instruction sets of this build."""
