"""Teachers in folders that `from_pretrained` of transformers, PEFT and diffusers reads."""

import pytest
import torch
from diffusers import UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from wmateacher import WMATeacher
from wmateacher.integrations.pretrained import FILE, from_pretrained, save_pretrained


def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip


def language_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).to(dtype)


def adapter():
    config = LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(language_model(), config)


def train(student, teacher, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in student.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
        teacher.update()


def assert_same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        found = other.state_dict()[name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize(
    ("build", "read"),
    [
        (unet, UNet2DModel.from_pretrained),
        (lambda: language_model(torch.bfloat16), GPT2LMHeadModel.from_pretrained),
        (adapter, lambda folder: PeftModel.from_pretrained(language_model(), folder)),
    ],
    ids=["diffusers", "transformers", "peft"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's call
def test_a_folder_holds_the_average_and_its_clock(tmp_path, build, read):
    """The model's own `from_pretrained` reads the average; the run continues from it with the same bits."""
    student = build()
    teacher = WMATeacher(student, "beta(0.5,0.5)", total_steps=10, update_every=2)
    train(student, teacher, 4, seed=1)
    save_pretrained(teacher, tmp_path)
    average = dict(read(tmp_path).named_parameters())
    assert average
    for name, p in teacher.module.named_parameters():
        assert torch.equal(average[name], p)
    other = build()
    other.load_state_dict(student.state_dict())
    resumed = from_pretrained(tmp_path, other)
    assert (str(resumed.kernel), resumed.step, resumed.total_steps) == ("beta(0.5,0.5)", 4, 10)
    assert_same(resumed, teacher)
    train(student, teacher, 3, seed=2)
    train(other, resumed, 3, seed=2)
    assert_same(resumed, teacher)


def test_a_class_is_read_from_the_folder_itself(tmp_path):
    student = unet()
    teacher = WMATeacher(student, "ema(0.5)")
    train(student, teacher, 2, seed=1)
    save_pretrained(teacher, tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    resumed = from_pretrained(tmp_path, UNet2DModel)
    assert_same(resumed, teacher)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor(3)
    for model in (resumed, resumed.student.eval()):
        torch.testing.assert_close(model(x, t).sample, teacher(x, t).sample)


def test_what_does_not_fit_is_refused(tmp_path):
    student = unet()
    teacher = WMATeacher(student, "ema(0.5)")
    with pytest.raises(FileNotFoundError, match="no teacher.pt .* the weights alone have no clock"):
        from_pretrained(tmp_path, UNet2DModel)
    with pytest.raises(TypeError, match="a Linear has no save_pretrained.*teacher.averaged_state_dict"):
        save_pretrained(WMATeacher(nn.Linear(2, 2), "ema(0.5)"), tmp_path)
    with teacher.swap(), pytest.raises(RuntimeError, match="inside swap"):
        save_pretrained(teacher, tmp_path)
    assert not list(tmp_path.iterdir())
    save_pretrained(teacher, tmp_path)
    with pytest.raises(TypeError, match="a class that has from_pretrained, got <class '.*Linear'>"):
        from_pretrained(tmp_path, nn.Linear)
    with pytest.raises(
        ValueError, match=r"written with kernel='ema\(0.5\)', this teacher has kernel='ema\(0.9\)'"
    ):
        from_pretrained(tmp_path, unet(), "ema(0.9)")
    with pytest.raises(ValueError, match="another architecture"):
        from_pretrained(tmp_path, language_model())
    torch.save({"step": 3}, tmp_path / FILE)
    with pytest.raises(ValueError, match="is not a teacher's file"):
        from_pretrained(tmp_path, unet())


def test_an_interrupted_save_leaves_no_clock_beside_other_weights(tmp_path, monkeypatch):
    student = unet()
    teacher = WMATeacher(student, "ema(0.5)")
    save_pretrained(teacher, tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(teacher, tmp_path)
    with pytest.raises(FileNotFoundError, match="no teacher.pt"):
        from_pretrained(tmp_path, UNet2DModel)


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_the_average_moves_when_its_diffusion_model_does():
    """The scenarios of diffusers' own tests of its average."""
    student = unet()
    teacher = WMATeacher(student, "ema(0.9)")
    start = vector(teacher.module)
    teacher.update()
    assert teacher.step == 1
    assert torch.equal(vector(teacher.module), start)  # of a student that has not moved
    positions = [start]
    for step in (2, 3):
        train(student, teacher, 1, seed=step)
        assert teacher.step == step
        positions.append(vector(teacher.module))
        torch.testing.assert_close(positions[-1], 0.9 * positions[-2] + 0.1 * vector(student))
        assert not torch.equal(positions[-1], positions[-2])
    latest = WMATeacher(student, "ema(0.0)")
    train(student, latest, 1, seed=4)
    assert torch.equal(vector(latest.module), vector(student))
