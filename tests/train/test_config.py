"""The training configuration: files, changes on the command line, and one clear sentence for every mistake."""

import re
from pathlib import Path

import pytest
import yaml

from vat_fast.config import ConfigError
from vat_fast.train import config as config_module
from vat_fast.train.config import Config, config_from_dict, load_config
from vat_fast.train.deepspeed_config import deepspeed_config

CONFIGS = sorted((Path(__file__).parents[2] / "train" / "configs").glob("*.yaml"))
RANKS = {"smoke": 2, "vit_tiny_cpu": 2, "vit_tiny_libero": 2}
SMALL = {"output": "runs/x", "data": {"paths": ["packed/x"]}, "train": {"steps": 10}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_resolve(path: Path) -> None:
    ranks = RANKS.get(path.stem, 4)
    config = load_config(path).resolve(ranks)
    t = config.train
    assert config.micro_batch * config.accumulation * ranks == t.global_batch
    made = deepspeed_config(config)
    assert made["train_batch_size"] == t.global_batch
    assert made["zero_optimization"]["stage"] == config.zero.stage
    assert config.output.startswith("runs/")


def test_there_is_a_file_for_every_suite_and_stage() -> None:
    loaded = {path.stem: load_config(path) for path in CONFIGS}
    for suite in ("spatial", "object", "goal", "10"):
        config = loaded[f"libero_{suite}"]
        assert config.data.paths == [f"packed/libero_{suite}_no_noops"]
        assert config.model.preset == "siglip2-so400m"
        t = config.train
        recipe = (t.lr, t.warmup, t.final_lr, t.global_batch, t.epochs, t.precision, t.weight_decay, t.clip)
        assert recipe == (2e-5, 0.1, 1e-7, 128, 100, "autocast", 0.01, None)
        assert (config.seed, t.beta1, t.beta2, t.eps, t.decay_all) == (42, 0.9, 0.999, 1e-8, True)
    assert {config.zero.stage for config in loaded.values()} >= {1, 2, 3}
    assert {config.model.preset for config in loaded.values()} >= {"siglip2-giantopt", "dinov2-large", "vit-tiny"}


def test_every_key_is_in_the_commented_file() -> None:
    text = (CONFIGS[0].parent / "libero_spatial.yaml").read_text()
    values = yaml.safe_load(text)
    defaults = config_from_dict(SMALL).to_dict()
    assert list(values) == list(defaults)
    for section, entry in defaults.items():
        if isinstance(entry, dict):
            assert list(values[section]) == list(entry), section
    for line in text.splitlines():
        if re.match(r"  \w+: ", line) and line.split(":")[0].strip() not in ("beta1", "beta2", "eps", "std"):
            assert "#" in line, f"no comment: {line}"


def test_yaml_round_trip() -> None:
    config = load_config(CONFIGS[0])
    assert config_from_dict(yaml.safe_load(config.to_yaml())) == config


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "output: runs/x\nseed: 7\ndata: {paths: [a]}\ntrain: {steps: 10, lr: 1e-4, final_lr: 0, eps: 1.e-6}\n"
    )
    config = load_config(path, ["train.weight_decay=5e-2", "zero.stage=2", "model.options.depth=3", "log.wandb=null"])
    t = config.train
    assert (config.seed, t.lr, t.final_lr, t.eps, t.weight_decay) == (7, 1e-4, 0, 1e-6, 0.05)
    assert (config.zero.stage, config.model.options, config.log.wandb) == (2, {"depth": 3}, None)


def test_a_base_file_gives_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(yaml.safe_dump({**SMALL, "train": {"steps": 10, "lr": 0.5}, "seed": 3}))
    (tmp_path / "above.yaml").write_text("base: below.yaml\noutput: runs/y\ntrain: {steps: 20}\n")
    config = load_config(tmp_path / "above.yaml")
    assert (config.output, config.seed, config.train.steps, config.train.lr) == ("runs/y", 3, 20, 0.5)
    assert config.data.paths == ["packed/x"]


MISTAKES = {
    "trian.lr=1": "unknown key trian (did you mean train?)",
    "train.lrr=1": "unknown key train.lrr (did you mean train.lr?)",
    "train.lr=fast": "train.lr must be a valid number, got 'fast'",
    "train.lr=-1": "train.lr must be above 0, got -1",
    "train.lr=.inf": "train.lr must be above 0, got inf",
    "train.steps=1.5": "train.steps must be a valid integer, got 1.5",
    "train.steps=0": "train.steps must be at least 1",
    "train.epochs=3": "exactly one of train.steps and train.epochs must be given, got 10 and 3",
    "train.precision=fp16": "train.precision must be 'fp32', 'autocast', 'bf16' or 'auto', got 'fp16'",
    "train.recompute=1": "train.recompute must be a valid boolean, got 1",
    "train.clip=0": "train.clip must be above 0, or null for none, got 0",
    "train.lora={rnk: 4}": "unknown key train.lora.rnk",
    "model.preset=vit-tinny": "model.preset 'vit-tinny' is unknown (did you mean vit-tiny?)",
    "model.options.dept=3": "model.options: unknown field 'dept' (did you mean 'depth'?)",
    "model.options.depth=1": "model.options: depth must be at least 2",
    "model=vit-tiny": "model must be an object, got 'vit-tiny'",
    "data.paths=[]": "data.paths must name at least one dataset",
    "data.paths=a": "data.paths must be a valid array, got 'a'",
    "data.weights=[1, 2]": "data.weights must have one number per path, got 2 for 1",
    "data.holdout=1": "data.holdout must be at least 0 and below 1, got 1",
    "data.holdout=0": "validation needs held-out episodes",
    "data.mean=[0.5]": "data.mean must be three numbers, one per channel, got [0.5]",
    "zero.stage=4": "zero.stage must be 0, 1, 2 or 3, got 4",
    "zero.offload=all": "zero.offload 'all' needs zero.stage 3, got 1",
    "checkpoint.keep_last=0": "checkpoint.keep_last must be at least 1",
    "seed=-1": "seed must be at least 0, got -1",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_are_named(change: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(ConfigError, match=re.escape(MISTAKES[change])):
        load_config(path, [change])


def test_combinations_that_deepspeed_gets_wrong_are_refused() -> None:
    def with_values(**sections: dict[str, object]) -> Config:
        return config_from_dict({**SMALL, **{name: {**SMALL.get(name, {}), **s} for name, s in sections.items()}})  # type: ignore[dict-item]

    with pytest.raises(ConfigError, match=r"zero.stage 0 with train.precision 'bf16' is wrong in DeepSpeed"):
        with_values(zero={"stage": 0}, train={"precision": "bf16"})
    with pytest.raises(ConfigError, match=r"zero.offload 'optimizer' needs zero.stage 1, 2 or 3"):
        with_values(zero={"stage": 0, "offload": "optimizer"})
    assert deepspeed_config(with_values().resolve(1))["gradient_clipping"] == 0.0
    assert deepspeed_config(with_values(train={"clip": 0.5}).resolve(1))["gradient_clipping"] == 0.5


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)
    path.write_text("just words")
    with pytest.raises(ConfigError, match="must hold sections such as model, data and train, got str"):
        load_config(path)
    path.write_text(yaml.safe_dump({key: value for key, value in SMALL.items() if key != "output"}))
    with pytest.raises(ConfigError, match="output is missing"):
        load_config(path)
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(ConfigError, match=r"--set takes section.key=value, got 'train.lr'"):
        load_config(path, ["train.lr"])


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation", "ranks", "expected"),
    [
        (128, None, None, 4, (32, 1)),
        (128, 8, None, 4, (8, 4)),
        (128, None, 2, 4, (16, 2)),
        (128, 8, 4, 4, (8, 4)),
        (6, None, None, 4, "train.global_batch 6 is not a multiple of the 4 ranks"),
        (128, 9, None, 4, "must be micro_batch 9 x accumulation 3 x 4 ranks, which is 108"),
        (128, 8, 2, 4, "must be micro_batch 8 x accumulation 2 x 4 ranks, which is 64"),
        (4, None, 3, 2, "must be micro_batch 0 x accumulation 3 x 2 ranks, which is 0"),
    ],
)
def test_batch_sizes_multiply(
    batch: int, micro: int | None, accumulation: int | None, ranks: int, expected: tuple[int, int] | str
) -> None:
    train = {"steps": 10, "global_batch": batch, "micro_batch": micro, "accumulation": accumulation}
    config = config_from_dict({**SMALL, "train": train})
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            config.resolve(ranks)
        return
    resolved = config.resolve(ranks)
    assert (resolved.micro_batch, resolved.accumulation) == expected


@pytest.mark.parametrize(("there", "chosen"), [(True, "autocast"), (False, "fp32")])
def test_automatic_precision_is_what_the_device_multiplies(
    monkeypatch: pytest.MonkeyPatch, there: bool, chosen: str
) -> None:
    asked = []
    monkeypatch.setattr("vat_fast.precision.multiplies_bfloat16", lambda device: asked.append(device) or there)
    config = config_from_dict({**SMALL, "train": {"steps": 10, "precision": "auto"}})
    assert config.resolve(1, "cuda").train.precision == chosen
    assert asked == ["cuda"]
    fixed = config_from_dict({**SMALL, "train": {"steps": 10, "precision": "bf16"}})
    assert fixed.resolve(1).train.precision == "bf16"


def test_every_field_is_documented() -> None:
    sections = [config_module.Config, *(kind for name, kind in vars(config_module).items() if name.endswith("Section"))]
    assert len(sections) == 8
    for kind in sections:
        documented = set(re.findall(r"^\s*((?:\w+, )*\w+):", kind.__doc__ or "", re.M))
        names = {name for entry in documented for name in entry.split(", ")}
        fields = {name for name in kind.__dataclass_fields__ if not name.startswith("_")}
        if kind is config_module.Config:
            fields = {"output", "seed"}  # the sections are documented as classes
        assert fields <= names, f"{kind.__name__}: {fields - names}"
