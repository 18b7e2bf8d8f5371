"""YAML as recipes are written and saved: PyYAML with the numbers that people write.

Plain YAML 1.1 reads 1e-3 as text, 010 as 8, 3:5 as a number in base 60 and 2024-01-01 as a date.
Here 1e-3 is a number and the others are text. A key that appears twice in a mapping is an error.
"""

import re
from typing import Any

import yaml

_INT = r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def parse_yaml(text: str) -> Any:
    """Returns the plain nested values of a YAML document. Raises ValueError, in one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as e:
        raise ValueError(" ".join(str(e).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def format_yaml(value: Any) -> str:
    """Writes plain nested values as YAML, from which `parse_yaml` reads equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in names[:i]:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as something else."""


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _kind, _pattern in (("int", _INT), ("float", _FLOAT)):
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list("-+.0123456789")
        )
