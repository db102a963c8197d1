"""YAML as recipes and device files hold it: plain types, nothing lost or blown up in silence."""

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from compress.core.errors import InputError, shown


def parse_yaml(text: str, where: str) -> Any:
    """Return the one value of a YAML text, of plain types.

    Raises InputError when it is not YAML, and for what would be lost or blow up in silence: a key
    given twice, and aliases, with which a kilobyte of text can stand for gigabytes.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not readable YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{where} is not readable YAML: it is nested too deeply") from None
    except (ValueError, KeyError, AttributeError) as error:
        # PyYAML's constructors on scalars that only look like a date, a number or a tag's type
        raise InputError(
            f"{where} is not readable YAML: a value cannot be what it looks like or is tagged as "
            f"({error}); put text in quotes"
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which knows plain types only, without aliases and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise ComposerError(
                None, None, "aliases are not supported, write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ConstructorError(
                        None, None, f"key {shown(key.value)} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
