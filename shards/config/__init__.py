"""Typed settings: YAML files with ``key=value`` overrides into pydantic models that refuse unknown keys."""
