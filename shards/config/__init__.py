"""Typed configuration: YAML files with ``key=value`` overrides, parsed into pydantic models without unknown keys."""
