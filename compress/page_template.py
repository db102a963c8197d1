"""Templates of the pages that the commands write."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template


@cache
def page_template(package: str, name: str) -> Template:
    """A file of a package, compiled once in a process; a name that it is not given is an error."""
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)
