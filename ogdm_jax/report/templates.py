"""The rules of templates, which the report's page and model cards share."""

from typing import Any

import jinja2


def environment(**options: Any) -> jinja2.Environment:
    """Where the templates of this folder are found; a name that a template misses is an error."""
    loader = jinja2.PackageLoader("ogdm_jax.report", "")
    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, **options}
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **blocks)
