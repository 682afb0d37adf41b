"""What cannot be averaged is refused by name, and outputs stay within the range of their dtype."""

import json
import warnings

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher, files
from wmateacher.posthoc import average_checkpoints, interpolate, model_stock

W = {"w": torch.ones(2, 2)}


def quantised(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these dtypes are deprecated
        return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, dtype)


REFUSED = {
    "integers alone": (
        {"n": torch.tensor([1, 2]), "m": torch.tensor(3)},
        "nothing to average: none of its 2",
    ),
    "booleans alone": ({"mask": torch.ones(2, 2) > 0}, "nothing to average: none of its 1"),
    "qint8": (
        W | {"q": quantised(torch.qint8)},
        "'q' is quantised .torch.qint8. in state dict 0 .* dequantise",
    ),
    "qint32": (
        W | {"q": quantised(torch.qint32)},
        "'q' is quantised .torch.qint32.",
    ),
    "a packed tuple": (
        W | {"fc._packed_params._packed_params": (quantised(torch.qint8), None)},
        "'fc._packed_params._packed_params' is a tuple of tensors .* dequantise",
    ),
    "a list of tensors": (W | {"parts": [torch.ones(2)]}, "'parts' is a list of tensors"),
    "packed bytes": (
        W | {"fc.weight": torch.ones(8, 1, dtype=torch.uint8), "fc.weight.absmax": torch.ones(2)},
        "'fc.weight' is quantised .torch.uint8.",
    ),
    "packed words": (W | {"fc.qweight": torch.ones(8, 2, dtype=torch.int32)}, "'fc.qweight' is quantised"),
    "sparse": (
        W | {"s": torch.ones(2, 2).to_sparse()},
        "'s' is a sparse tensor .torch.sparse_coo. .* to_dense",
    ),
    "sparse rows": (
        {"s": torch.ones(3, 2).to_sparse(1), "n": torch.tensor(1)},
        "'s' is a sparse tensor .torch.sparse_coo. .* to_dense",
    ),
    "a number as a key": (
        W | {3: torch.ones(2)},
        "a tensor under the key 3, a int: .* rename it to a string",
    ),
    "a tuple as a key": (W | {("a", 1): torch.ones(2)}, r"under the key \('a', 1\), a tuple"),
}


@pytest.mark.parametrize(("state", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_averaged_is_refused_by_name(state, message):
    for merge in (
        lambda: average_checkpoints([state, state]),
        lambda: interpolate(state, state, 0.5),
        lambda: model_stock(state, [state, state]),
    ):
        with pytest.raises(ValueError, match=message):
            merge()


def test_integer_buffers_beside_weights_are_taken_from_the_last():
    def state(i):
        return {
            "bn.weight": torch.full((2,), float(i)),
            "bn.num_batches_tracked": torch.tensor(i),
            "position_ids": torch.full((1, 4), i),
            "mask": torch.full((2, 2), i > 0),
            "note": (i, "text"),
        }

    result = average_checkpoints([state(0), state(2)])
    assert result["bn.weight"].tolist() == [1, 1]
    assert (result["bn.num_batches_tracked"], result["note"]) == (2, (2, "text"))
    assert result["position_ids"].tolist() == [[2] * 4]
    assert result["mask"].all()


# --- the range of the dtype ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 70_000.0), (torch.float16, -1e9), (torch.float8_e4m3fn, 1e3), (torch.float8_e5m2, -1e6),
     (torch.bfloat16, 1e300), (torch.float32, -1e39)],
)  # fmt: skip
def test_a_result_beyond_the_range_of_its_dtype_is_refused(dtype, value):
    wide = {"a.b": torch.tensor([0.0, value], dtype=torch.float64)}
    narrow = {"a.b": torch.zeros(2, dtype=dtype)}
    with pytest.raises(
        ValueError, match=rf"'a.b' is beyond the range of {dtype}, .* in state dict 1: convert"
    ):
        interpolate(wide, narrow, 0.01)
    assert interpolate(narrow, wide, 0.01)["a.b"][1] == value * 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_largest_number_of_a_dtype_is_its_own_average(dtype):
    largest = torch.tensor([1.0, -1.0]).mul(torch.finfo(dtype).max).to(dtype)
    result = average_checkpoints([{"w": largest}] * 3)["w"]
    assert result.dtype == dtype
    assert torch.equal(result.float(), largest.float())


def test_nan_is_named_in_a_dtype_without_infinity():
    state = {"w": torch.full((2,), float("nan")).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match="'w' has NaN or infinite values in state dict 0"):
        average_checkpoints([state, state])


# --- teachers -----------------------------------------------------------------------------------------


def teacher_state(value):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    return WMATeacher(model, "uniform", 10).state_dict()


@pytest.mark.parametrize(
    ("wrap", "key", "better"),
    [
        (lambda s: s, ".", "module"),
        (lambda s: {"teacher": s}, "teacher", "teacher.module"),
        (lambda s: {"model": W, "callbacks": {"t": s}}, "callbacks.t", "callbacks.t.module"),
        (lambda s: {f"net.ema.{k}": v for k, v in s.items()}, "net.ema", "net.ema.module"),
    ],
)
def test_a_key_never_chooses_the_clock_of_a_teacher(tmp_path, wrap, key, better):
    sources = [wrap(teacher_state(i)) for i in (1.0, 3.0)]
    torch.save(sources[0], tmp_path / "a.pt")
    for source in (sources[0], tmp_path / "a.pt"):
        with pytest.raises(ValueError, match=f"no model under '{key}': .*averaged weights.*key='{better}'"):
            average_checkpoints([source, sources[1]], key=key)
        result = average_checkpoints([source, sources[1]], key=better)
        assert result.keys() == {"weight", "bias"}
        assert result["weight"].item() == 2
        nn.Linear(1, 1).load_state_dict(result)


def test_a_teacher_inside_of_a_model_is_refused():
    model = nn.Sequential(nn.Linear(1, 1))
    model.append(WMATeacher(model[0], "uniform", 10))
    with pytest.raises(ValueError, match=r"holds the state of a teacher, whose clock is '1._extra_state'"):
        average_checkpoints([model.state_dict()] * 2)
    assert average_checkpoints([model.state_dict()] * 2, key="0").keys() == {"weight", "bias"}


# --- configurations -----------------------------------------------------------------------------------


def folder(path, config, name="config.json", stem="model"):
    path.mkdir()
    files.save(W, path / f"{stem}.safetensors")
    (path / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return path


BASE = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "text_config": {"heads": 4, "dtype": "float32"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"differ in hidden_act \('gelu', 'relu'\)"),
        ({"rope_scaling": {"factor": 2.0}}, r"differ in rope_scaling.factor \(None, 2.0\)"),
        ({"text_config": {"heads": 2}}, r"differ in text_config.heads \(4, 2\)"),
        ({"layer_norm_eps": 0}, r"layer_norm_eps \(1e-05, 0\)"),
        ({"quantization_config": {"bits": 4}}, "/1' is quantised .quantization_config in config.json"),
    ],
)
def test_models_of_different_configurations_are_refused(tmp_path, change, message):
    sources = [folder(tmp_path / "0", BASE), folder(tmp_path / "1", BASE | change)]
    for merge in (
        lambda: average_checkpoints(sources, output=tmp_path / "out"),
        lambda: interpolate(*sources, 0.5, output=tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=message):
            merge()
    assert not (tmp_path / "out").exists()
    assert average_checkpoints([s / "model.safetensors" for s in sources])["w"].sum() == 4


def test_what_does_not_decide_the_function_may_differ(tmp_path):
    other = BASE | {
        "_name_or_path": "x", "transformers_version": "5", "attention_dropout": 0.1, "use_cache": False,
        "torch_dtype": "float16", "rope_scaling": None, "text_config": {"heads": 4, "dtype": "float16"},
    }  # fmt: skip
    sources = [folder(tmp_path / "0", BASE), folder(tmp_path / "1", other), W]
    assert average_checkpoints(sources)["w"].sum() == 4


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"lora_alpha": 32}, False),
        ({"use_rslora": True}, False),
        ({"alpha_pattern": {"q": 4}}, False),
        ({"target_modules": ["q", "k"]}, False),
        ({"target_modules": ["v", "q"], "use_rslora": False, "rank_pattern": {}}, True),
        ({"lora_dropout": 0.1, "inference_mode": True, "base_model_name_or_path": "x"}, True),
    ],
)
def test_adapters_of_one_scale_are_averaged(tmp_path, change, same):
    base = {"r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]}
    sources = [
        folder(tmp_path / str(i), config, "adapter_config.json", "adapter_model")
        for i, config in enumerate((base, base | change))
    ]
    if same:
        assert average_checkpoints(sources)["w"].sum() == 4
    else:
        with pytest.raises(ValueError, match=f"differ in {next(iter(change))}"):
            average_checkpoints(sources)


@pytest.mark.parametrize("text", ["", "[1]", "version https://git-lfs"])
def test_a_configuration_that_is_no_json_is_named(tmp_path, text):
    with pytest.raises(ValueError, match=r"config.json' is not a configuration in JSON"):
        average_checkpoints([folder(tmp_path / "0", text)])
