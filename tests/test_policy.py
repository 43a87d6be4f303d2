"""The policy around the model: what the model is given, what the robot gets, files and errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vat_fast.actions import FieldStatistics, Statistics, StatisticsError, gripper_command, save_statistics
from vat_fast.config import ConfigError, VATConfig
from vat_fast.frozen.engine import FrozenVAT
from vat_fast.model import VAT
from vat_fast.observation import ImageProcessing, ObservationError, ObservationProcessor
from vat_fast.policy import Policy, PolicyConfig
from vat_fast.tasks import RELEASED_TABLES, TaskError, TaskTable

C, A, S = 4, 7, 32
MODEL = VATConfig.from_preset(
    "vit-tiny", image_size=S, width=48, mlp_hidden=64, depth=3, chunk_size=C, action_dim=A, num_tasks=10
)
IMAGE = ImageProcessing(image_size=S)
CONFIG = PolicyConfig(image=IMAGE, tasks=RELEASED_TABLES["libero_goal"], statistics_key="libero_goal_no_noops")


def field(dim: int, seed: int, grip: bool) -> FieldStatistics:
    rng = np.random.default_rng(seed)
    low, high = -rng.uniform(0.5, 2, dim), rng.uniform(0.5, 2, dim)
    mask = np.arange(dim) < dim - 1 if grip else None
    return FieldStatistics(0 * low, 1 + 0 * low, 2 * low, 2 * high, low, high, mask)


STATISTICS = Statistics("libero_goal_no_noops", field(A, 0, grip=True), field(8, 1, grip=False), 100, 5)


class Recorder(nn.Module):
    """A stand-in for VAT that notes what it is called with and predicts `calls + step / 100` everywhere."""

    def __init__(self, config: VATConfig = MODEL) -> None:
        super().__init__()
        self.config = config
        self.unit = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]] = []

    def forward(self, pixels: Tensor, task_id: Tensor, proprio: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append((pixels, task_id, proprio, options))
        steps = torch.arange(self.config.chunk_size, dtype=self.unit.dtype) / 100
        chunk = (len(self.calls) - 1 + steps)[None, :, None]
        return self.unit * chunk.expand(len(pixels), -1, self.config.action_dim)


def make_observation(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=4)
    return {
        "agentview_image": rng.integers(0, 256, (48, 48, 3), dtype=np.uint8),
        "robot0_eye_in_hand_image": rng.integers(0, 256, (40, 56, 3), dtype=np.uint8),
        "robot0_eef_pos": rng.normal(size=3),
        "robot0_eef_quat": quaternion / np.linalg.norm(quaternion),
        "robot0_gripper_qpos": rng.normal(size=2),
    }


def make_vat(**changes: Any) -> VAT:
    torch.manual_seed(0)
    return VAT(MODEL.replace(**changes)).eval()


def unnormalized(x: NDArray[Any]) -> NDArray[np.float32]:
    """Robot units by hand, gripper still in the model's convention."""
    s = STATISTICS.action
    out = 0.5 * (x + 1) * (s.q99 - s.q01 + 1e-8) + s.q01
    out[..., -1] = x[..., -1]
    return out.astype(np.float32)


# One chunk.


def test_act_is_the_model_between_processor_and_statistics() -> None:
    """A real VAT, with every step around it spelled out."""
    vat, observation = make_vat(proprio_dim=8), make_observation()
    actions = Policy(vat, CONFIG, STATISTICS).act(observation, "turn on the stove")
    processed = ObservationProcessor(IMAGE, CONFIG.cameras, STATISTICS.proprio)(observation)
    assert processed.proprio is not None
    with torch.no_grad():
        x = vat(torch.from_numpy(processed.pixels)[None], torch.tensor([9]), torch.from_numpy(processed.proprio)[None])[
            0
        ]
    expected = unnormalized(x.numpy())
    expected[:, -1] = -np.sign(2 * x.numpy()[:, -1] - 1)
    assert actions.shape == (C, A)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, atol=1e-6)
    # The inputs matter.
    policy = Policy(vat, CONFIG, STATISTICS)
    assert not np.allclose(policy.act(make_observation(1), 9)[:, :-1], actions[:, :-1])
    assert not np.allclose(policy.act({**observation, "robot0_eef_pos": np.zeros(3)}, 9)[:, :-1], actions[:, :-1])


def test_a_batch_is_its_samples_one_by_one() -> None:
    policy = Policy(make_vat(proprio_dim=8), CONFIG, STATISTICS)
    observations = [make_observation(seed) for seed in range(3)]
    tasks: list[str | int] = ["turn on the stove", 0, 4]
    batch = policy.act_batch(observations, tasks)
    assert batch.shape == (3, C, A)
    for b, (observation, task) in enumerate(zip(observations, tasks, strict=True)):
        np.testing.assert_allclose(batch[b], policy.act(observation, task), atol=2e-5)
    for four in ([4, 4, 4], np.array([4, 4, 4]), torch.tensor([4, 4, 4])):
        np.testing.assert_array_equal(policy.act_batch(observations, 4), policy.act_batch(observations, four))  # type: ignore[arg-type]
    for wrong in ([], [1, 2]):
        with pytest.raises(ValueError, match=f"one task per observation, got 3 and {len(wrong)}"):
            policy.act_batch(observations, wrong)
    with pytest.raises(ValueError, match="one task per observation, got 0"):
        policy.act_batch([], 1)


def test_the_model_gets_its_own_dtype_and_no_proprio_it_cannot_read() -> None:
    vat = Recorder().to(torch.bfloat16)
    actions = Policy(vat, CONFIG, STATISTICS).act(make_observation(), 3)
    pixels, task_id, proprio, options = vat.calls[0]
    assert (pixels.shape, pixels.dtype) == ((1, 2, 3, S, S), torch.bfloat16)
    assert (task_id.tolist(), task_id.dtype) == ([3], torch.int64)
    assert proprio is None
    assert options == {}
    assert actions.dtype == np.float32


class Engine:
    """Not a Module: what a frozen engine looks like to a policy."""

    config = MODEL

    def __call__(self, pixels: Tensor, task_id: Tensor, proprio: Tensor | None = None, /, **options: Any) -> Tensor:
        return pixels.mean() * torch.ones(len(pixels), C, A, dtype=pixels.dtype)


def test_any_callable_with_a_config_will_do(tmp_path: Path) -> None:
    policy = Policy(Engine(), CONFIG, STATISTICS, dtype=torch.float64)
    pixels = ObservationProcessor(IMAGE, CONFIG.cameras)(make_observation()).pixels
    actions = policy.act(make_observation(), 0)
    np.testing.assert_allclose(
        actions[:, :-1], unnormalized(np.full((C, A), pixels.mean(dtype=np.float64)))[:, :-1], atol=1e-6
    )
    with pytest.raises(TypeError, match="Engine cannot be saved"):
        policy.save_pretrained(tmp_path)


# Diffusion.


def test_diffusion_noise_is_reproducible() -> None:
    vat, observation = make_vat(head="diffusion", diffusion_steps=3), make_observation()
    config = dataclasses.replace(CONFIG, gripper="none")
    policy = Policy(vat, config, STATISTICS, seed=1)
    first, second = policy.act(observation, 0), policy.act(observation, 0)
    assert not np.allclose(first, second)
    policy.reset()
    np.testing.assert_array_equal(policy.act(observation, 0), first)
    np.testing.assert_array_equal(policy.act(observation, 0), second)
    np.testing.assert_array_equal(Policy(vat, config, STATISTICS, seed=1).act(observation, 0), first)
    policy.reset(seed=2)
    assert not np.allclose(policy.act(observation, 0), first)
    given = [policy.act(observation, 0, torch.Generator().manual_seed(7)) for _ in range(2)]
    np.testing.assert_array_equal(given[0], given[1])


# Step by step.


def step_many(policy: Policy, steps: int, task: str | int = 0) -> NDArray[np.float32]:
    return np.stack([policy.step(make_observation(t), task) for t in range(steps)])


def predicted(call: int, step: int) -> NDArray[np.float64]:
    """What `Recorder` predicts, in its call number `call`, for the chunk's action `step`."""
    return np.full(A, call + step / 100)


@pytest.mark.parametrize("every", [None, 1, 2, 3, 4])
def test_step_executes_chunks(every: int | None) -> None:
    vat, k = Recorder(), every or C
    got = step_many(Policy(vat, dataclasses.replace(CONFIG, replan_every=every), STATISTICS), 10)
    assert len(vat.calls) == -(-10 // k)
    expected = unnormalized(np.stack([predicted(t // k, t % k) for t in range(10)]))
    np.testing.assert_allclose(got, gripper_command(expected, "libero"), atol=1e-6)
    # Each call sees the observation of its own step.
    first = ObservationProcessor(IMAGE, CONFIG.cameras)
    for call, (pixels, *_) in enumerate(vat.calls):
        np.testing.assert_array_equal(pixels[0].numpy(), first(make_observation(call * k)).pixels)


@pytest.mark.parametrize("every", [None, 2])
def test_step_with_temporal_ensembling(every: int | None) -> None:
    vat, k, m = Recorder(), every or 1, 0.3
    config = dataclasses.replace(CONFIG, replan_every=every, temporal_ensembling=m, gripper="none")
    got = step_many(Policy(vat, config, STATISTICS), 9)
    assert len(vat.calls) == -(-9 // k)
    for t in range(9):
        votes = [predicted(call, t - call * k) for call in range(t // k + 1) if t - call * k < C]
        weights = np.exp(-m * np.arange(len(votes)))
        expected = unnormalized((weights / weights.sum()) @ np.stack(votes))
        np.testing.assert_allclose(got[t], expected, rtol=1e-5)


def test_ensembling_averages_the_gripper_before_it_is_rounded() -> None:
    """Two votes of 1.0 and one of 0.0 give open; the average of rounded commands would be -1/3."""

    class Grip(Recorder):
        def forward(self, pixels: Tensor, task_id: Tensor, proprio: Tensor | None = None, **options: Any) -> Tensor:
            chunk = torch.full((1, C, A), 1.0 if len(self.calls) < 2 else 0.0)
            self.calls.append((pixels, task_id, proprio, options))
            return chunk

    policy = Policy(Grip(), dataclasses.replace(CONFIG, temporal_ensembling=0.0), STATISTICS)
    np.testing.assert_array_equal(step_many(policy, 5)[:, -1], [-1, -1, -1, 0, 1])


def test_reset_and_a_new_task_drop_the_plan() -> None:
    vat = Recorder()
    policy = Policy(vat, CONFIG, STATISTICS)
    step_many(policy, 2)
    policy.reset()
    step_many(policy, 1)
    assert len(vat.calls) == 2
    policy.step(make_observation(), "open the middle drawer of the cabinet")
    assert len(vat.calls) == 2
    policy.step(make_observation(), 1)
    assert [call[1].tolist() for call in vat.calls] == [[0], [0], [1]]


def test_executors_step_many_robots_like_one() -> None:
    """The parts for parallel environments: executors of their own around one batched prediction."""
    config = dataclasses.replace(CONFIG, temporal_ensembling=0.1, replan_every=2)
    vat = make_vat()
    alone = [step_many(Policy(vat, config, STATISTICS), 5, task) for task in (2, 5)]
    policy = Policy(vat, config, STATISTICS)
    executors = [policy.new_executor() for _ in range(2)]
    for t in range(5):
        if executors[0].needs_chunk:
            chunks = policy.predict([make_observation(t)] * 2, [2, 5])
            for executor, chunk in zip(executors, chunks, strict=True):
                executor.push(chunk)
        actions = policy.to_robot(np.stack([executor.pop() for executor in executors]))
        np.testing.assert_allclose(actions, [alone[0][t], alone[1][t]], atol=2e-5)


# Errors.


def test_bad_inputs_reach_the_user_as_one_error() -> None:
    policy = Policy(make_vat(), CONFIG, STATISTICS)
    with pytest.raises(TaskError, match="the closest are 'put the bowl on the stove'"):
        policy.act(make_observation(), "put bowl on the stove")
    with pytest.raises(ObservationError, match="camera 'agentview_image' is not in the observation"):
        policy.act({}, 0)
    by_id = Policy(make_vat(), dataclasses.replace(CONFIG, tasks=None), STATISTICS)
    assert by_id.task_id(9) == 9
    with pytest.raises(TaskError, match="ids are 0 to 9"):
        by_id.act(make_observation(), 10)
    with pytest.raises(TaskError, match="no task table"):
        by_id.act(make_observation(), "turn on the stove")


@pytest.mark.parametrize(
    ("model", "config", "statistics", "message"),
    [
        ({"image_size": 64}, {}, {}, "images are made 32 pixels wide, the model takes 64"),
        ({"num_views": 3}, {}, {}, "the model sees 3 views, but cameras are agentview_image, robot0"),
        ({"action_dim": 14}, {}, {}, "actions have 14 numbers, the statistics 7"),
        ({"proprio_dim": 8}, {}, {"proprio": None}, "'libero_goal_no_noops' have no proprio entry"),
        ({"proprio_dim": 9}, {}, {}, "reads 9 numbers of proprio, the statistics have 8"),
        ({}, {"statistics_key": "other"}, {}, "wants statistics 'other', got 'libero_goal_no_noops'"),
        ({}, {"replan_every": 5}, {}, "replan_every 5 is more than the chunk of 4"),
        ({"num_tasks": 9}, {}, {}, "task 'turn on the stove' has id 9, but the model knows 9 tasks"),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_error(model: Any, config: Any, statistics: Any, message: str) -> None:
    vat = Recorder(MODEL.replace(**model))
    with pytest.raises(ConfigError, match=message):
        Policy(vat, dataclasses.replace(CONFIG, **config), dataclasses.replace(STATISTICS, **statistics))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "PolicyConfig is stored as a JSON object, got list"),
        ({"camera": []}, r"unknown field 'camera' \(did you mean 'cameras'\?\)"),
        ({"cameras": []}, "cameras must be at least one name"),
        ({"image": {"crop_area": 2}}, "crop_area must be"),
        ({"image": None}, "ImageProcessing is stored as a JSON object"),
        ({"tasks": {"a": -1}}, "tasks: the id of task 'a'"),
        ({"gripper": "suction"}, "gripper convention must be one of libero, none, got 'suction'"),
        ({"replan_every": 0}, "replan_every must be an integer of at least 1"),
        ({"replan_every": True}, "replan_every must be"),
        ({"temporal_ensembling": -0.1}, "temporal_ensembling must be a number of at least 0"),
        ({"temporal_ensembling": float("nan")}, "temporal_ensembling must be"),
        ({"statistics_key": 3}, "statistics_key must be"),
    ],
)
def test_an_impossible_configuration_is_one_clear_error(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig.from_dict(values)


def test_configuration_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    for config in (
        PolicyConfig(),
        PolicyConfig(ImageProcessing("none", None), ("a", "b"), TaskTable({"x": 3}), "key", "none", 2, 0.01),
    ):
        config.save(path)
        assert PolicyConfig.load(path) == config
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"policy\.json is not JSON"):
        PolicyConfig.load(path)
    path.write_text('{"gripper": 1}')
    with pytest.raises(ConfigError, match=r"policy\.json: gripper convention"):
        PolicyConfig.load(path)


def test_released_settings_are_the_defaults() -> None:
    config = PolicyConfig.released("libero_10")
    assert config == PolicyConfig(tasks=RELEASED_TABLES["libero_10"], statistics_key="libero_10_no_noops")
    assert config.image == ImageProcessing("rotate_180", 95, "fast", 224, "lanczos3", 0.9)
    assert PolicyConfig.released("libero_spatial_object_goal").statistics_key is None
    with pytest.raises(ConfigError, match="unknown suite 'libero_20'; there are libero_spatial, "):
        PolicyConfig.released("libero_20")


# Folders.


def test_saved_policies_act_the_same(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, replan_every=3, temporal_ensembling=0.02)
    policy = Policy(make_vat(proprio_dim=8), config, STATISTICS)
    policy.save_pretrained(tmp_path / "policy")
    names = {"config.json", "model.safetensors", "policy.json", "dataset_statistics.json"}
    assert {file.name for file in (tmp_path / "policy").iterdir()} == names
    again = Policy.from_pretrained(tmp_path / "policy", frozen=False)
    assert again.config == config
    assert again.statistics.to_dict() == STATISTICS.to_dict()
    assert isinstance(again.vat, VAT)
    assert not again.vat.training
    weights = again.vat.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in make_vat(proprio_dim=8).state_dict().items())
    # Loaded weights are a memory map, aligned otherwise than allocated ones: BLAS sums in another order.
    np.testing.assert_allclose(again.act(make_observation(), 4), policy.act(make_observation(), 4), atol=1e-5)
    half = Policy.from_pretrained(tmp_path / "policy", dtype=torch.bfloat16, frozen=False)
    assert half.dtype == torch.bfloat16
    np.testing.assert_allclose(
        half.act(make_observation(), 4)[:, :-1], policy.act(make_observation(), 4)[:, :-1], atol=0.1
    )


def test_policies_are_frozen_by_default(tmp_path: Path) -> None:
    policy = Policy(make_vat(proprio_dim=8), CONFIG, STATISTICS)
    policy.save_pretrained(tmp_path / "policy")
    frozen = Policy.from_pretrained(tmp_path / "policy", batch=[1, 2])
    assert isinstance(frozen.vat, FrozenVAT)
    np.testing.assert_allclose(frozen.act(make_observation(), 4), policy.act(make_observation(), 4), atol=1e-5)
    batch = [make_observation()] * 3
    np.testing.assert_allclose(frozen.act_batch(batch, 4), policy.act_batch(batch, 4), atol=1e-5)
    half = Policy.from_pretrained(tmp_path / "policy", dtype="bf16")
    assert half.vat.target.dtype == "bf16"
    np.testing.assert_allclose(
        half.act(make_observation(), 4)[:, :-1], policy.act(make_observation(), 4)[:, :-1], atol=0.1
    )
    with pytest.raises(TypeError, match="cannot be saved; save the policy of the VAT it came from"):
        frozen.save_pretrained(tmp_path / "again")
    with pytest.raises(TypeError, match="batch is for a frozen policy"):
        Policy.from_pretrained(tmp_path / "policy", frozen=False, batch=2)


def test_a_frozen_model_may_normalise_images_itself() -> None:
    vat = make_vat()
    options = {"images": "uint8", "mean": CONFIG.image.mean, "std": CONFIG.image.std}
    frozen = Policy(vat.freeze(executor="torch", **options), CONFIG, STATISTICS)
    plain = Policy(vat, CONFIG, STATISTICS)
    np.testing.assert_allclose(frozen.act(make_observation(), 4), plain.act(make_observation(), 4), atol=1e-5)
    with pytest.raises(ConfigError, match=r"frozen for images of mean \(0.5, 0.5, 0.5\)"):
        Policy(vat.freeze(images="uint8", mean=(0.5, 0.5, 0.5)), CONFIG, STATISTICS)


def test_a_folder_without_settings_takes_them_from_its_suite(tmp_path: Path) -> None:
    """As in the authors' folders: statistics, no policy.json. Image size is the model's, not 224."""
    folder = tmp_path / "released"
    model = make_vat(num_tasks=30)
    policy = Policy(model, CONFIG, STATISTICS)
    policy.save_pretrained(folder)
    (folder / "policy.json").unlink()
    found = Policy.from_pretrained(folder)
    assert found.config == CONFIG
    np.testing.assert_allclose(found.act(make_observation(), 4), policy.act(make_observation(), 4), atol=1e-5)

    suites = ("libero_spatial", "libero_object", "libero_goal")
    three = [dataclasses.replace(STATISTICS, key=f"{name}_no_noops") for name in suites]
    save_statistics(folder / "dataset_statistics.json", three)
    with pytest.raises(ConfigError, match=r"not those of one LIBERO suite; name the suite, or pass config="):
        Policy.from_pretrained(folder)
    combined = Policy.from_pretrained(folder, suite="libero_object")
    assert combined.statistics.key == "libero_object_no_noops"
    assert combined.task_id("turn on the stove") == 29
    with pytest.raises(StatisticsError, match="has no dataset 'libero_10_no_noops'"):
        Policy.from_pretrained(folder, suite="libero_10")
    with pytest.raises(ConfigError, match="suite='libero_goal' is for released folders"):
        Policy.from_pretrained(folder, suite="libero_goal", config=CONFIG)


def test_incomplete_folders_are_one_clear_error(tmp_path: Path) -> None:
    policy = Policy(make_vat(), CONFIG, STATISTICS)
    policy.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "policy.json").write_text(json.dumps(CONFIG.to_dict() | {"gripper": "?"}))
    with pytest.raises(ConfigError, match=r"policy\.json: gripper convention"):
        Policy.from_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "dataset_statistics.json").unlink()
    with pytest.raises(StatisticsError, match=r"dataset_statistics\.json does not exist; a policy needs"):
        Policy.from_pretrained(tmp_path / "policy")
    shutil.rmtree(tmp_path / "policy")
    with pytest.raises(FileNotFoundError, match=r"no folder .*policy; give a folder, or a Hub id"):
        Policy.from_pretrained(tmp_path / "policy")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    CONFIG.save(path)
    before = path.read_text()

    def broken(source: str, target: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        dataclasses.replace(CONFIG, replan_every=1).save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]
