"""Reading of a PEFT adapter's configuration, `adapter_config.json`; every field is checked before PEFT gets it.

Some of PEFT's fields name modules that it imports, models and tokenizers that it loads, or files that it opens. A
configuration is therefore read by a table of the fields that a replay needs, each with its type. A field outside the table
may stand in the file only with the default of its class, as PEFT itself writes it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_hf.method_info import plain
from zo_hf.untrusted import plain_json
from zo_hf.untrusted.fields import (
    Fits,
    brief,
    either,
    is_flag,
    is_number,
    is_object,
    is_text,
    list_of,
    maybe,
    object_of,
    one_of,
    shown,
    whole,
)

if TYPE_CHECKING:
    from peft import PeftConfig

FILE = "adapter_config.json"  # as PEFT calls it

_COUNT = maybe(whole(0, 1 << 20))
_SEED = maybe(whole(-(1 << 63)))
_NUMBER, _FLAG = maybe(is_number), maybe(is_flag)
_NAMES = list_of(is_text, most=1 << 16)
_INDICES = list_of(whole(0, 1 << 31))


def _is_harmless_pattern(value: Any) -> bool:
    """Return whether PEFT matches a regular expression in little time: few repeats, and none of a group."""
    if not is_text(value) or len(value) > 1000 or len(re.findall(r"[*+{]", value)) > 4:
        return False
    if re.search(r"\)[*+{]", value):
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_MODULES = maybe(either(_is_harmless_pattern, _NAMES))
_PATTERN = maybe(lambda value: object_of(is_number)(value) and all(map(_is_harmless_pattern, value)))


def _fields(fits: Fits, names: str) -> dict[str, Fits]:
    return dict.fromkeys(names.split(), fits)


#: Fields of PEFT's configurations that shape the adapter, for all of its methods.
FIELDS: dict[str, Fits] = {
    "peft_type": is_text,
    "task_type": maybe(
        one_of("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
    ),
    **_fields(_MODULES, "target_modules exclude_modules feedforward_modules layers_pattern modules_to_save"),
    **_fields(maybe(_NAMES), "target_parameters"),
    **_fields(_PATTERN, "rank_pattern alpha_pattern lambda_pattern block_size_pattern n_frequency_pattern"),
    **_fields(maybe(either(whole(), _INDICES)), "layers_to_transform"),
    "trainable_token_indices": maybe(either(_INDICES, object_of(_INDICES))),
    "token_indices": _INDICES,
    "init_lora_weights": either(
        is_flag,
        lambda value: (
            is_text(value) and bool(re.fullmatch(r"gaussian|olora|orthogonal|pissa(_niter_\d{1,3})?", value))
        ),
    ),
    "init_weights": maybe(
        either(is_flag, one_of("gaussian", "kaiming_uniform", "xavier_uniform", "lycoris", "bat", "mini", "zero"))
    ),
    "ab_svd_init": one_of("psoft_init", "pissa_init"),
    "act_fn": one_of("relu", "gelu", "silu", "tanh", "sigmoid", "identity", "none"),
    "bias": one_of("none", "all", "lora_only", "delora_only", "oft_only", "boft_only"),
    **_fields(maybe(one_of("lora", "vector", "constant", "none")), "config_A_B config_C config_D_E"),
    "decomposition_method": one_of("relu", "qr"),
    "encoder_reparameterization_type": one_of("MLP", "LSTM"),
    "mask_type": one_of("random"),
    "poly_type": one_of("poly"),
    "prompt_tuning_init": one_of("RANDOM"),  # the others load a tokenizer or a file; the log holds the weights
    "psoft_svd": one_of("full", "lowrank"),
    "variant": one_of("road_1", "road_2", "road_4"),
    "wavelet_family": lambda value: is_text(value) and bool(re.fullmatch(r"[a-z]{2,5}[\d.]{0,4}", value)),
    **_fields(
        _COUNT,
        "adapter_layers adapter_len asa_target_subspaces block_size boft_block_num boft_block_size "
        "boft_n_butterfly_factor decompose_factor depth encoder_hidden_size encoder_num_layers final_warmup gralora_k "
        "group_size hybrid_r init_warmup mask_interval mini_r n_frequency n_skills n_splits n_tasks num_B "
        "num_attention_heads num_cayley_neumann_terms num_frozen_tokens num_layers num_ranks num_subspaces num_tasks "
        "num_transformer_submodules num_vectors num_virtual_tokens oft_block_size qalora_group_size r "
        "shadow_hidden_size shadow_intermediate_size shadow_num_attention_heads shadow_num_hidden_layers stride_A "
        "subspace_rank token_dim topk u update_hidden_size vector_length theta_d_length psoft_svd_lowrank_niter",
    ),
    **_fields(_SEED, "generator_seed proj_seed projection_prng_key projection_seed random_loc_seed random_seed"),
    **_fields(
        _NUMBER,
        "alpha asa_importance_beta asa_schedule_exponent asa_uncertainty_beta auxiliary_loss_weight boft_dropout "
        "cayley_neumann_eps d_initial deft_dropout delora_lambda encoder_dropout eps frod_dropout gralora_dropout "
        "hira_dropout init_logits_std init_scale init_theta_d_bound init_v_bound init_vector_bank_bound lora_alpha "
        "lora_dropout miss_dropout module_dropout psoft_alpha psoft_dropout pvera_dropout randlora_alpha "
        "randlora_dropout rank_dropout regularization_alpha scaling shadow_alpha shadow_dropout sparse_rate sparsity "
        "svd_threshold tinylora_dropout unilora_dropout vblora_dropout vera_dropout weight_tying",
    ),
    **_fields(
        _FLAG,
        "apply_GS block_share coft decompose_both ensure_weight_tying fan_in_fan_out inference_mode init_ia3_weights "
        "lora_bias para prefix_projection progressbar proportional_parameters psoft_mag_a psoft_mag_b psoft_orth "
        "rank_dropout_scale runtime_offload_base_weight sample_at_inference save_indices save_only_topk_weights "
        "save_precomputed_indices save_projection select_top share_embeddings sparse use_asa use_cayley_neumann "
        "use_dora use_dynamic_rank use_effective_conv2d use_idwt use_qalora use_rslora very_sparse",
    ),
}
#: Fields that only describe, and are left out: the base model is the one that the user names.
_DESCRIBE = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "runtime_config")


def read_adapter_config(folder: Path) -> PeftConfig:
    """Read the configuration of an adapter in PEFT's format, with checked fields only.

    Args:
        folder: the adapter's folder.

    Raises:
        ValueError: the file cannot be read, or has a field that could make PEFT import, load or open something.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path = folder / FILE
    way_out = "wrap the model with your own configuration in Python if you trust it"
    content = _content(path)
    kinds = {str(plain(kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(content["peft_type"])
    if kind is None:
        raise ValueError(
            f"{path} has the peft_type {shown(content['peft_type'])}, which PEFT lacks; install a newer peft."
        )
    defaults = _defaults(kind)
    taken: dict[str, Any] = {}
    for name, value in content.items():
        if name in _DESCRIBE or (name in defaults and _is_default(value, defaults[name])):
            continue
        if name not in FIELDS or name not in defaults or not FIELDS[name](value):
            raise ValueError(
                f"{path} sets {shown(name)}={brief(value)}, which zo_hf does not hand to PEFT; {way_out}."
            )
        taken[name] = value
    taken.pop("peft_type", None)
    try:
        return kind(**taken)
    except (ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{path} is not a PEFT configuration ({shown(reason)}); {way_out}.") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = plain_json.read(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); copy it from where the adapter came from."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not a PEFT configuration, because {error}; use another copy of it.") from error
    if not is_object(content) or not is_text(content.get("peft_type")):
        raise ValueError(f"{path} is not a PEFT configuration, because it names no peft_type; use another copy of it.")
    return content


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the default of every field of a dataclass; a field without one has the default `MISSING`."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
    }


def _is_default(value: Any, default: Any) -> bool:
    is_record = dataclasses.is_dataclass(default) and not isinstance(default, type)
    plain = dataclasses.asdict(default) if is_record else default
    return type(value) is type(plain) and bool(value == plain)
