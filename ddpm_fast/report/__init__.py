"""A profile as a file: JSON, a trace, or one HTML page."""

from .files import facts, trace, write_html, write_json, write_trace

__all__ = ["facts", "trace", "write_html", "write_json", "write_trace"]
