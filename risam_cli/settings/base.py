"""The base of all settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from risam_cli.files.jsonlines import brief

_MOST = 1 << 63


class OddValue(ValueError):
    """What is wrong with the value of one key, of which the check of all keys tells."""

    def __init__(self, key: str, value: object, why: str) -> None:
        self.key = key
        self.value = brief(value)
        super().__init__(why)


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, numbers finite, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        """Refuse what Python takes for a number or a path, and nobody means as one."""
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(str(key))
            if isinstance(value, bool) and field and str(field.annotation).find("bool") < 0:
                raise OddValue(key, value, "it does not take true or false")
            items = value if isinstance(value, list | tuple) else [value]
            if any(type(item) is int and not -_MOST <= item < _MOST for item in items):
                raise OddValue(key, value, "the number is beyond 63 bits")
            if any(isinstance(item, str) and "\0" in item for item in items):
                raise OddValue(key, value, "a text cannot hold a NUL character")
        return values


Positive = Field(gt=0)
