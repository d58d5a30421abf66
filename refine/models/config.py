"""What every fast-weight model is configured by."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from refine.models.names import nearest

# Keys of published config.json files that choose a kernel of the code they were trained with, not the mathematics.
_KERNEL_CHOICES = frozenset(
    {"attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"}
    | {"use_fused_kernel", "fp32_states", "elementwise_affine", "conv_backend", "lact_chunk_impl"}
)


def check_sizes(model_type: str, **sizes) -> None:
    """Refuse, by name, what is neither a whole number of at least 1 nor None."""
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"{model_type} config: {name} must be a whole number of at least 1, got {size!r}"
            )


def check_numbers(model_type: str, *, least: float | None = None, most: float = math.inf, **numbers) -> None:
    """Refuse, by name, what is no finite number above 0 (or of at least ``least``), up to ``most``; None passes."""
    for name, number in numbers.items():
        if number is None:
            continue
        real = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if not real or number > most or not (number > 0 if least is None else number >= least):
            allowed = "above 0" if least is None else f"of at least {least:g}"
            allowed += "" if most == math.inf else f" and at most {most:g}"
            raise ValueError(f"{model_type} config: {name} must be a finite number {allowed}, got {number!r}")


class FastWeightConfig(PretrainedConfig):
    """What every fast-weight model is configured by.

    ``config.json`` files of published checkpoints carry keys of many versions. Keys that only choose a
    peer's kernel are kept and ignored; keys that change the mathematics are read, and a value that is not
    implemented is refused by name. A key that is not known at all is kept with a warning, unless it is off.

    A subclass states ``layer_type``, the kind of all its layers, or takes ``layer_types``, one name a layer; the
    model class says which token mixer a name stands for (its ``mixers``).
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "cache", "last_hidden_state", "entropy", "logprob", "token", "trace",
    ]  # fmt: skip
    # key -> the values that this project implements; anything else would load and silently be another model
    only_implemented: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("swish", "silu"),
        "use_short_conv": (True,),
        "conv_bias": (False, None),
        "attn": (None,),
        "attnres_block_size": (None,),
        "elementwise_affine": (True, None),
        "use_l2warp": (False, None),
        "logit_scale": (1, None),
        "residual_in_fp32": (False, None),
    }
    layer_type: ClassVar[str] = "linear_attention"
    auto_map: ClassVar[dict] = {}  # no code of its own travels with a checkpoint; TRL looks here

    def __init_subclass__(cls, **kwargs):
        # transformers makes a dataclass of every subclass, whose __init__ would replace an inherited one
        if "__init__" not in vars(cls):
            cls.__init__ = cls.__init__
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        intermediate_size: int | None = None,
        hidden_ratio: int | None = 4,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        for key, implemented in self.only_implemented.items():
            if key in kwargs and kwargs[key] not in implemented:
                allowed = " or ".join(repr(value) for value in implemented)
                raise ValueError(
                    f"{self.model_type} config: {key}={kwargs[key]!r} is not implemented, only {allowed} is"
                )
        check_sizes(
            self.model_type, vocab_size=vocab_size, hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers, intermediate_size=intermediate_size,
        )  # fmt: skip
        check_numbers(self.model_type, hidden_ratio=hidden_ratio, norm_eps=norm_eps)
        check_numbers(self.model_type, least=0, initializer_range=initializer_range)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        try:
            super().__init__(
                pad_token_id=pad_token_id,
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                tie_word_embeddings=tie_word_embeddings,
                **kwargs,
            )
        except StrictDataclassError as error:  # transformers' own check of types
            raise ValueError(f"{self.model_type} config: {error}") from error
        for key in sorted(kwargs.keys() - self.settings() - self.only_implemented.keys() - _KERNEL_CHOICES):
            if kwargs[key] not in (None, False) and not key.startswith("_"):
                near = nearest(key, self.settings())
                warnings.warn(f"{self.model_type} config: {key!r} is unknown, no effect{near}", stacklevel=2)

    @classmethod
    def settings(cls) -> frozenset[str]:
        """Names that this configuration takes: its own, and those of every ``transformers`` configuration."""
        own = (
            name
            for kind in cls.__mro__
            if kind is not PretrainedConfig
            and "__init__" in vars(kind)
            and issubclass(kind, PretrainedConfig)
            for name in inspect.signature(kind.__init__).parameters
        )
        return frozenset(own) - {"self", "kwargs", "args"} | _TRANSFORMERS_KEYS

    @classmethod
    def check_settings(cls, given, where: str, also: frozenset[str] = frozenset()) -> None:
        """Refuse keys that a user has written and that this configuration does not take.

        Args:
            given: the keys.
            where: what they were given to, for the message.
            also: what else may be given there.

        Raises:
            ValueError: names the first such key and the nearest that exists.
        """
        known = cls.settings() | cls.only_implemented.keys() | also
        for key in sorted(given):
            if key not in known:
                raise ValueError(f"{where}: {key!r} is no setting of {cls.model_type}{nearest(key, known)}")

    @property
    def mixer_types(self) -> list[str]:
        """The kind of each layer's token mixer, one name a layer."""
        given = getattr(self, "layer_types", None)
        return [self.layer_type] * self.num_hidden_layers if given is None else list(given)

    @property
    def mlp_size(self) -> int:
        """Width of the gated MLP: as given, else 2/3 of ``hidden_ratio * hidden_size`` rounded up to 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
        return 256 * -(-width // 256)


_TRANSFORMERS_KEYS = frozenset(PretrainedConfig().to_dict()) | {
    "torch_dtype", "auto_map", "name_or_path", "attn_implementation", "use_return_dict", "quantization_config",
    "num_labels", "torchscript", "layer_types", "tokenizer_class",
}  # fmt: skip
