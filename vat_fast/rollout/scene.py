"""One LIBERO task as a simulated scene: reset, step, look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vat_fast.observation import axis_angle
from vat_fast.rollout.displace import move_objects, plan_displacement
from vat_fast.rollout.install_check import check_simulator, import_simulator
from vat_fast.rollout.render import Renderer, RenderSettings
from vat_fast.rollout.states import task_files

CAMERAS = ("agentview", "robot0_eye_in_hand")
"""The main and the wrist camera, in the order of the model's views."""

NO_OP = np.array([0.0, 0, 0, 0, 0, 0, -1])
"""The action of the settling steps: stay, gripper open."""

SETTLING_STEPS = 10
"""The authors' number of no-ops before an episode: in the initial states, things hang a little above the table."""


class Scene:
    """The scene of one LIBERO task, with LIBERO's own physics, initial states and success check.

        with Scene("libero_object", 3, size=256) as scene:
            scene.reset(init_state=0)
            scene.settle(10)
            while not scene.step(policy(scene.observe())):
                ...

    A step without `observe` renders nothing. Whether and how often images are rendered changes nothing in the
    physics, bit for bit. What happens depends on suite, task, initial state, displacement and the actions alone, not
    on what the scene was used for before.

    The initial states leave open where fixtures (cabinet, stove, rack) stand; LIBERO draws them within a centimetre
    or two at each reset. Here they are drawn from a generator seeded by the initial state's number.

    Args:
        suite: "spatial", "libero_spatial", or a LIBERO-PRO suite's full name.
        task_id: number of the task in the suite's official order.
        size: of the square images, in pixels.
        render: how images are made.
        cameras: names in the simulator; () for a scene that nobody looks at.

    Raises:
        SimulatorError: the simulator or the library that renders is missing.
        ValueError: unknown suite, task or camera, or an impossible size.
    """

    def __init__(
        self,
        suite: str,
        task_id: int,
        *,
        size: int = 256,
        render: RenderSettings | None = None,
        cameras: Sequence[str] = CAMERAS,
    ) -> None:
        check_simulator(rendering=bool(cameras))
        if size < 16:
            raise ValueError(f"images must be at least 16 pixels wide, got {size}")
        import_simulator()
        from libero.libero.envs.env_wrapper import ControlEnv

        self.files = task_files(suite, task_id)
        self.size, self.render, self.cameras = size, render or RenderSettings(), tuple(cameras)
        with _numpy_seed(0):
            self.control_env = ControlEnv(
                str(self.files.bddl),
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                hard_reset=False,
                horizon=10**9,
                ignore_done=True,
            )
        self.env = self.control_env.env
        """robosuite's environment, for who needs more than a policy sees."""
        known = [self.sim.model.camera_id2name(i) for i in range(self.sim.model.ncam)]
        for camera in self.cameras:
            if camera not in known:
                raise ValueError(f"the scene has no camera {camera!r}; it has {', '.join(known)}")
        # robosuite would compute dozens of observations in every one of its 25 substeps; `observe` has its own.
        for name in self.env.observation_names:
            self.env.modify_observable(name, "enabled", False)
        self._renderer = Renderer(self.sim, size, self.render) if self.cameras else None
        self._success = False
        self.displacement: dict[str, tuple[float, float]] = {}

    @property
    def suite(self) -> str:
        """Full name of the suite."""
        return self.files.suite

    @property
    def task_id(self) -> int:
        """Number of the task in the suite."""
        return self.files.task_id

    @property
    def task_name(self) -> str:
        """The task as policies know it: "put the bowl on the stove"."""
        return self.files.name

    @property
    def num_init_states(self) -> int:
        """Official initial states, 50 for the official suites."""
        return len(self.files.init_states)

    @property
    def sim(self) -> Any:
        """robosuite's MjSim."""
        return self.env.sim

    @property
    def success(self) -> bool:
        """Whether the goal was reached when LIBERO last checked: after the last step, or at the reset."""
        return self._success

    def reset(self, init_state: int = 0, displace_cm: float = 0.0, displace_seed: int = 0) -> None:
        """Go to an initial state.

        Args:
            init_state: number of the official initial state.
            displace_cm: move the objects of the goal by up to so many centimetres, see `plan_displacement`.
            displace_seed: of the displacement, which is the same for whoever is evaluated in this scene.

        Raises:
            ValueError: no such initial state, or an impossible displacement.
        """
        if not 0 <= init_state < self.num_init_states:
            raise ValueError(
                f"{self.suite} task {self.task_id} has init states 0 to {self.num_init_states - 1}, got {init_state}"
            )
        self._go_to(init_state)
        self.displacement = {}
        if displace_cm:
            # In the initial states things hang a little above where they come to rest: plan with what has settled.
            self.settle(SETTLING_STEPS)
            self.displacement = plan_displacement(self, displace_cm, (init_state, displace_seed))
            self._go_to(init_state)
            move_objects(self, self.displacement)
        self._success = bool(self.env._check_success())

    def _go_to(self, init_state: int) -> None:
        with _numpy_seed(init_state):
            self.control_env.reset()
        # A soft reset leaves the gripper's own memory: its command moves by a hundredth a substep.
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self.control_env.set_init_state(self.files.init_states[init_state])

    def settle(self, steps: int) -> None:
        """Let things come to rest: `steps` no-op actions with open gripper (the authors take `SETTLING_STEPS`)."""
        for _ in range(steps):
            self.step(NO_OP)

    def step(self, action: ArrayLike) -> bool:
        """Carry out one action (7,): position and rotation deltas in [-1, 1], gripper -1 open or +1 close, at 20 Hz.

        Returns:
            Whether the goal is reached.

        Raises:
            ValueError: not seven finite numbers.
        """
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (7,) or not np.isfinite(command).all():
            raise ValueError(f"an action is 7 finite numbers, got {np.asarray(action).tolist()}")
        self._success = bool(self.env.step(command)[2])
        return self._success

    def observe(self) -> dict[str, NDArray[Any]]:
        """What a policy sees: `<camera>_image` (S, S, 3) uint8, upside down as rendered, and `state` (8,) float64.

        It is the state at the end of the step; robosuite observes one or two of its 25 substeps earlier.

        The state is the end effector's position (3, metres) and axis-angle (3, radians), and the two finger joints.
        """
        images = {} if self._renderer is None else {f"{c}_image": self._renderer.image(c) for c in self.cameras}
        return {**images, "state": self.proprio()}

    def proprio(self) -> NDArray[np.float64]:
        """The `state` of `observe` (8,)."""
        robot = self.robot_state()
        return np.concatenate([robot["eef_pos"], axis_angle(robot["eef_quat"]), robot["gripper_qpos"]])

    def robot_state(self) -> dict[str, NDArray[np.float64]]:
        """eef_pos (3), eef_quat (4, x y z w), gripper_qpos (2) and joint_pos (7), as robosuite observes them."""
        robot, data = self.env.robots[0], self.sim.data
        return {
            "eef_pos": np.array(data.site_xpos[robot.eef_site_id]),
            "eef_quat": np.roll(data.get_body_xquat(robot.robot_model.eef_name), -1),
            "gripper_qpos": np.array(data.qpos[robot._ref_gripper_joint_pos_indexes]),
            "joint_pos": np.array(data.qpos[robot._ref_joint_pos_indexes]),
        }

    def sim_state(self) -> NDArray[np.float64]:
        """Time, positions and velocities of everything, flattened as the official initial states are."""
        state: NDArray[np.float64] = self.control_env.get_sim_state()
        return state

    def close(self) -> None:
        """Free the simulation and what renders it."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self.control_env.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _numpy_seed:  # noqa: N801
    """Seed NumPy's global generator, from which LIBERO draws, and put it back afterwards."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._state = np.random.get_state()
        np.random.seed(self._seed)

    def __exit__(self, *exception: object) -> None:
        np.random.set_state(self._state)
