"""RoPE scaling between config.json (`rope_scaling`) and our records, both ways."""

from __future__ import annotations

from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.models import rope_scaling
from jaxmoe.models.pretrained.config_reader import ConfigReader

ORIGINAL, LONGEST = "original_max_position_embeddings", "max_position_embeddings"
FIELDS: dict[str, tuple[type[rope_scaling.RopeScaling], dict[str, str]]] = {
  "default": (rope_scaling.PlainRope, {}),
  "linear": (rope_scaling.LinearRope, {"factor": "factor"}),
  "dynamic": (rope_scaling.DynamicRope, {"factor": "factor"}),
  "llama3": (
    rope_scaling.Llama3Rope,
    {
      "factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
      "original": ORIGINAL,
    },
  ),
  "yarn": (
    rope_scaling.Yarn,
    {
      "factor": "factor", "original": ORIGINAL, "fast": "beta_fast", "slow": "beta_slow",
      "attention_factor": "attention_factor", "mscale": "mscale", "mscale_all": "mscale_all_dim",
      "truncate": "truncate",
    },
  ),
  "longrope": (
    rope_scaling.LongRope,
    {
      "short": "short_factor", "long": "long_factor", "original": ORIGINAL, "factor": "factor",
      "short_gain": "short_mscale", "long_gain": "long_mscale",
    },
  ),
}  # fmt: skip
"""By `rope_type`: our record, and its fields with their keys."""

OLD_NAMES = {"su": "longrope"}
ABSENT = {"mscale", "mscale_all_dim", "attention_factor", "short_mscale", "long_mscale"}
"""Keys whose zero means that they are not there."""

DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""What transformers takes where a key is not there; our records have the same."""


def read_rope(config: ConfigReader, default: float) -> tuple[float, Any]:
  """Returns the base of the angles, `default` where the config has none, and our record.

  Raises:
    InputError: a `rope_type` or a key that is not known, or a missing one.
  """
  theta, plain = config.rope(default)
  kind = plain.pop("rope_type")
  kind = OLD_NAMES.get(kind, kind)
  if kind not in FIELDS:
    raise InputError(
      f"{config.where}: rope_type={kind!r} is not known here, only {', '.join(FIELDS)}"
    )
  if plain.pop("partial_rotary_factor", 1.0) != 1:
    raise InputError(f"{config.where}: a partial_rotary_factor is not known here")
  cls, fields = FIELDS[kind]
  plain = _completed(config, kind, plain)
  strange = sorted(plain.keys() - set(fields.values()))
  if strange:
    raise InputError(f"{config.where}: {strange[0]} of a rope {kind} is not known here")
  missing = [
    key for key in fields.values() if key not in {*ABSENT, *DEFAULTS} and plain.get(key) is None
  ]
  if missing:
    raise InputError(f"{config.where}: a rope {kind} needs {missing[0]}; is the file whole?")
  values = {
    field: _value(plain[key])
    for field, key in fields.items()
    if plain.get(key) is not None and not (key in ABSENT and not plain[key])
  }
  if kind == "dynamic":
    values["original"] = config.get(int, LONGEST)
  return theta, cls(**values)


def _completed(config: ConfigReader, kind: str, plain: dict[str, Any]) -> dict[str, Any]:
  """Returns the keys with what the rest of the config says of them."""
  plain = dict(plain)
  if kind in ("llama3", "yarn", "longrope"):
    outside = config.get(int, ORIGINAL, default=None)
    plain[ORIGINAL] = outside or plain.get(ORIGINAL) or config.get(int, LONGEST)
    if plain.get("factor") is None:
      plain["factor"] = config.get(int, LONGEST) / plain[ORIGINAL]
  else:
    plain.pop(ORIGINAL, None)  # nobody reads it
  if kind == "longrope" and (gain := plain.pop("attention_factor", None)):
    plain = {**plain, "short_mscale": gain, "long_mscale": gain}
  return plain


def _value(value: Any) -> Any:
  """Returns a value of JSON as a field has it."""
  if isinstance(value, list):
    return tuple(map(float, value))
  return float(value) if isinstance(value, float) else value


def rope_keys(theta: float, record: Any) -> dict[str, Any]:
  """Returns the inverse of `read_rope`, in the keys of transformers 4, which 5 reads too."""
  kind = next(name for name, (cls, _) in FIELDS.items() if type(record) is cls)
  if kind == "default":
    return {"rope_theta": theta, "rope_scaling": None}
  scaling: dict[str, Any] = {"rope_type": kind}
  for field, key in FIELDS[kind][1].items():
    value = getattr(record, field)
    if value is not None:
      scaling[key] = list(value) if isinstance(value, tuple) else value
  keys: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
  if kind == "dynamic":
    keys[LONGEST] = record.original
  if kind == "longrope" and record.short_gain is not None and record.short_gain == record.long_gain:
    scaling["attention_factor"] = record.short_gain
  return keys


