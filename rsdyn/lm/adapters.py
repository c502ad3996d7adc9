"""PEFT adapters: small weights beside a model's own, which are merged into it before it is recorded."""

from __future__ import annotations

import json
from pathlib import Path

from rsdyn.errors import UserError

ADAPTER = "adapter_config.json"


def adapter_error(name: str, config: Path | None = None, *, has_weights: bool = False) -> UserError:
    """The error for a model that is, or has beside its weights, an adapter: how to merge it.

    Args:
        name: what the user called it.
        config: its ``adapter_config.json``; None where it is not on this machine.
        has_weights: whether a whole model lies beside the adapter.
    """
    kind, base = "", "its base model"
    try:
        found = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
        kind = f"{found['peft_type']} " if isinstance(found.get("peft_type"), str) else ""
        base = str(found.get("base_model_name_or_path") or base)
    except (OSError, ValueError, AttributeError):
        pass  # what it is for is not known then; how to merge it is
    what = f"a PEFT adapter ({kind}weights that are added to those of {base})"
    if has_weights:
        return UserError(
            f"name={name}: beside its weights the folder has {what}, and one of the two would not be used. Merge "
            f"it into its base model ({_recipe(name)}), or move {ADAPTER} out of the folder to record the model alone."
        )
    return UserError(
        f"name={name}: this is {what}, not a whole model. Merge it first: {_recipe(name)}; then give name=merged "
        f"tokenizer={base if ' ' not in base else '<its base model>'}."
    )


def _recipe(name: str) -> str:
    code = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({name!r}).merge_and_unload()"
        ".save_pretrained('merged')"
    )
    return f'pip install peft, then python -c "{code}"'
