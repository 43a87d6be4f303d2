"""The plan of a VAT before any optimisation: one step per operation, as eager PyTorch would run them."""

from __future__ import annotations

from typing import Any, Literal

from vat_fast.config import VATConfig
from vat_fast.frozen import recipes
from vat_fast.frozen.plan import Access, Buffer, Plan, Step, Stream, Weight
from vat_fast.frozen.recipes import Recipe, parameter

HEAD_EPS = 1e-5
"""LayerNorm's eps in the released heads: PyTorch's default."""


def base_plan(config: VATConfig, batch: int = 1, dtype: str = "fp32") -> Plan:
    """One forward of `batch` samples in `dtype` ("fp32", "bf16" or "fp16"), nothing merged, fused or dropped.

    Inputs: `pixels` (B, V, 3, H, W) normalised; `task_id` (B,) int64 with task conditioning; `proprio`; with a
    diffusion head `sample` (B, C, A), the starting noise. Output: `actions` (B, C, A).
    """
    return _Builder(config, batch, dtype).build()


class _Builder:
    """Writes down steps, buffers and weights in the order of `VAT.forward`."""

    def __init__(self, config: VATConfig, batch: int, dtype: str) -> None:
        self.c, self.B, self.dtype = config, batch, dtype
        self.steps: list[Step] = []
        self.loop: list[Step] = []
        self.buffers: dict[str, Buffer] = {}
        self.weights: dict[str, Weight] = {}
        self.stream: Stream = "vision"
        self.in_loop = False

    def build(self) -> Plan:
        c, B = self.c, self.B
        self.buffer("pixels", B, c.num_views, 3, c.image_size, c.image_size, role="input")
        if c.task_conditioning != "none":
            self.buffer("task_id", B, dtype="int64", role="input")
        if c.proprio_dim:
            self.buffer("proprio", B, 1, c.proprio_dim, role="input")
        diffusion = c.head == "diffusion"
        if diffusion:
            # Denoising accumulates in float32, whatever the network computes in; `ddim` overwrites it in place.
            self.buffer("sample", B, c.chunk_size, c.action_dim, dtype="fp32", role="input")
            self.buffer("timestep", B, dtype="int64", role="input")
        x, keys_values = self.embed(), []
        if c.action_stream == "last_layer":
            x = self.vision_to_the_end(x)
            keys_values = [self.baseline_keys(layer, x) for layer in range(c.layers)]
        # Both streams side by side, so that keys and values are read soon after they are written.
        a = self.start_action() if not diffusion else ""
        task = self.task_vector()
        for layer in range(c.layers):
            if c.action_stream != "last_layer":
                x, memory = self.vision_layer(layer, x)
                keys_values.append(memory)
            if not diffusion:
                a = self.action_layer(layer, a, task, keys_values[layer])
        if diffusion:
            self.in_loop = True
            a = self.start_action()
            task = self.task_vector()
            for layer in range(c.layers):
                a = self.action_layer(layer, a, task, keys_values[layer])
        self.head(a)
        return Plan(
            config=c,
            batch=B,
            dtype=self.dtype,
            steps=tuple(self.steps),
            loop=tuple(self.loop),
            repeats=c.diffusion_steps if diffusion else 0,
            buffers=self.buffers,
            weights=self.weights,
        ).tidied()

    # The pieces of a plan.

    def buffer(self, name: str, *shape: int, dtype: str = "", **fields: Any) -> str:
        self.buffers[name] = Buffer(name, tuple(shape), dtype or self.dtype, **fields)
        return name

    def weight(self, name: str, kind: Literal["matrix", "vector", "table"], *shape: int, recipe: Recipe) -> str:
        self.weights[name] = Weight(name, tuple(shape), kind, recipe)
        return name

    def matrix(self, module: str, out_width: int, in_width: int) -> dict[str, str]:
        """Weight and bias of a linear layer of the model."""
        return {
            "weight": self.weight(
                f"{module}.weight", "matrix", out_width, in_width, recipe=parameter(f"{module}.weight")
            ),
            "bias": self.weight(f"{module}.bias", "vector", out_width, recipe=parameter(f"{module}.bias")),
        }

    def vector(self, name: str, width: int) -> str:
        return self.weight(name, "vector", width, recipe=parameter(name))

    def step(self, name: str, op: str, inputs: dict[str, Any], out: Any, **fields: Any) -> str:
        """Add a step; accesses may be given as buffer names. Returns the name of the buffer it writes."""

        def access(value: Any) -> Access:
            return value if isinstance(value, Access) else Access(value)

        outputs = {"y": access(out)}
        new = Step(
            name, op, {role: access(value) for role, value in inputs.items()}, outputs, stream=self.stream, **fields
        )
        (self.loop if self.in_loop else self.steps).append(new)
        return outputs["y"].buffer

    def tokens(self, name: str, like: str, width: int) -> str:
        """A buffer with as many tokens as `like`."""
        return self.buffer(name, *self.buffers[like].shape[:-1], width)

    # Operations.

    def norm(self, name: str, x: Any, module: str, width: int, eps: float, out: str, group: int = 0) -> str:
        weights = {"weight": self.vector(f"{module}.weight", width), "bias": self.vector(f"{module}.bias", width)}
        options = {"eps": eps, **({"group": group} if group else {})}
        return self.step(name, "norm", {"x": x}, out, weights=weights, options=options)

    def linear(
        self,
        name: str,
        x: Any,
        module: str,
        shape: tuple[int, int],
        rows: tuple[int, int] | None = None,
        out: Any = None,
    ) -> str:
        """x times the weight of `module`, or times its rows `rows`."""
        width = shape[0] if rows is None else rows[1] - rows[0]
        if out is None:
            like = x.buffer if isinstance(x, Access) else x
            count = self.buffers[like].shape[:-1]
            if isinstance(x, Access) and x.tokens is not None:
                count = (count[0], x.tokens[1] - x.tokens[0])
            out = self.buffer(name, *count, width)
        options = {} if rows is None else {"rows": rows}
        return self.step(name, "linear", {"x": x}, out, weights=self.matrix(module, *shape), options=options)

    def activation(self, name: str, x: str, kind: str) -> str:
        return self.step(
            name, "activation", {"x": x}, self.tokens(name, x, self.buffers[x].shape[-1]), options={"kind": kind}
        )

    def residual(self, name: str, x: Any, h: str, scale: str | None) -> str:
        weights = {} if scale is None else {"scale": self.vector(scale, self.buffers[h].shape[-1])}
        return self.step(
            name, "residual", {"x": x, "h": h}, self.tokens(name, h, self.buffers[h].shape[-1]), weights=weights
        )

    def mlp(self, prefix: str, x: str, module: str, width: int, hidden: int, gelu: str, scale: str | None) -> str:
        """x + scale * fc2(gelu(fc1(norm2(x))))."""
        n = self.norm(
            f"{prefix}.norm2", x, f"{module}.norm2", width, self.c.norm_eps, self.tokens(f"{prefix}.norm2", x, width)
        )
        h = self.linear(f"{prefix}.fc1", n, f"{module}.fc1", (hidden, width))
        h = self.activation(f"{prefix}.gelu", h, "gelu" if gelu == "erf" else "gelu_tanh")
        h = self.linear(f"{prefix}.fc2", h, f"{module}.fc2", (width, hidden))
        return self.residual(f"{prefix}.out", x, h, scale)

    # The vision stream.

    def embed(self) -> str:
        c, V, N, D = self.c, self.c.num_views, self.c.tokens_per_view, self.c.width
        x = self.buffer("vision.embed", self.B, V * N, D)
        prefix = ["class_token"] * c.class_token + ["register_tokens"] * (c.num_registers > 0)
        table = recipes.position_table(parameter("pos_embed"), *map(parameter, prefix))
        weights = {
            "weight": self.weight(
                "patch_embed.weight", "matrix", D, 3, c.patch_size, c.patch_size, recipe=parameter("patch_embed.weight")
            ),
            "bias": self.vector("patch_embed.bias", D),
            "table": self.weight("vision.position", "vector", N, D, recipe=table),
        }
        for v in range(V):
            inputs = {"pixels": Access("pixels", tokens=(v, v + 1))}
            options = {"views": 1, "patch": c.patch_size, "prefix": c.num_prefix, "of": "vision.embed"}
            out = Access(x, tokens=(v * N, (v + 1) * N))
            self.step(f"vision.embed.view{v}", "patch_embed", inputs, out, weights=weights, options=options)
        return x

    def vision_layer(self, layer: int, x: str) -> tuple[str, Access]:
        """(the layer's output, the keys and values that the action stream reads)."""
        c, D, name, block = self.c, self.c.width, f"vision.{layer}", f"vision_blocks.{layer}"
        n = self.norm(f"{name}.norm1", x, f"{block}.norm1", D, c.norm_eps, self.tokens(f"{name}.norm1", x, D))
        qkv = self.linear(f"{name}.qkv", n, f"{block}.qkv", (3 * D, D))
        if c.action_stream == "shared":
            last = ((c.num_views - 1) * c.tokens_per_view, c.num_views * c.tokens_per_view)
            memory = Access(qkv, tokens=last if c.shared_keys == "last_view" else None, columns=(D, 3 * D))
        else:
            Da = c.action_width
            memory = Access(self.linear(f"{name}.kv", n, f"action_blocks.{layer}.key_value", (2 * Da, D)))
        return self.vision_block(layer, x, qkv), memory

    def vision_block(self, layer: int, x: str, qkv: str) -> str:
        """The rest of a ViT block behind its projection."""
        c, D, name, block = self.c, self.c.width, f"vision.{layer}", f"vision_blocks.{layer}"
        attended, N = self.tokens(f"{name}.attention", x, D), c.tokens_per_view
        for v in range(c.num_views):
            view = (v * N, (v + 1) * N)
            options = {"views": 1, "heads": c.num_heads, "scale": c.head_dim**-0.5, "of": f"{name}.attention"}
            inputs = {"qkv": Access(qkv, tokens=view, columns=(0, 3 * D))}
            self.step(f"{name}.attention.view{v}", "attention", inputs, Access(attended, tokens=view), options=options)
        ls1, ls2 = (f"{block}.ls1", f"{block}.ls2") if c.layer_scale is not None else (None, None)
        h = self.linear(f"{name}.proj", attended, f"{block}.proj", (D, D))
        x = self.residual(f"{name}.attended", x, h, ls1)
        return self.mlp(name, x, block, D, c.mlp_hidden, c.vision_gelu, ls2)

    def vision_to_the_end(self, x: str) -> str:
        """The baseline's ViT, then its tokens without prefix."""
        c, D = self.c, self.c.width
        for layer in range(c.vision_layers):
            name, block = f"vision.{layer}", f"vision_blocks.{layer}"
            n = self.norm(f"{name}.norm1", x, f"{block}.norm1", D, c.norm_eps, self.tokens(f"{name}.norm1", x, D))
            x = self.vision_block(layer, x, self.linear(f"{name}.qkv", n, f"{block}.qkv", (3 * D, D)))
        if not c.num_prefix:
            return x
        out = self.buffer("vision.patches", self.B, c.num_views * c.num_patches, D)
        return self.step(
            "vision.patches", "select", {"x": x}, out, options={"views": c.num_views, "prefix": c.num_prefix}
        )

    def baseline_keys(self, layer: int, x: str) -> Access:
        """Keys and values of one layer of the last-layer baseline."""
        D, Da, block = self.c.width, self.c.action_width, f"action_blocks.{layer}"
        n = self.tokens(f"vision.{layer}.norm_vision", x, D)
        n = self.norm(n, x, f"{block}.norm_vision", D, self.c.norm_eps, n)
        return Access(self.linear(f"vision.{layer}.kv", n, f"{block}.key_value", (2 * Da, D)))

    # The action stream.

    def start_action(self) -> str:
        """Action tokens with their positions, then the extra tokens: the buffer `action.start`."""
        self.stream = "action"
        c, Da, T, E = self.c, self.c.action_width, self.c.num_action_tokens, self.c.num_extra_tokens
        a = self.buffer("action.start", self.B, T + E, Da)
        own = Access(a, tokens=(0, T)) if E else Access(a)
        position = recipes.action_position(parameter("action_position.step"), parameter("action_position.dim"))
        if c.head == "diffusion":
            self.buffer("action.noisy", self.B, T, 1)
            self.step("action.noisy", "reshape", {"x": "sample"}, "action.noisy")
            h = self.projector("noisy_action_projector", "action.noisy", 1)
            table = self.weight("action.position", "vector", T, Da, recipe=position)
            self.step("action.tokens", "add", {"x": h}, own, weights={"weight": table})
        else:
            tokens = recipes.add(recipes.token_rows(parameter("action_tokens")), position)
            table = self.weight("action.tokens", "vector", T, Da, recipe=tokens)
            inputs: dict[str, Any] = {"vector": self.task_lookup()} if c.task_conditioning == "additive" else {}
            self.step("action.tokens", "broadcast", inputs, own, weights={"weight": table})
        if c.head == "diffusion":
            at = Access(a, tokens=(T, T + 1))
            steps = recipes.timesteps(c.diffusion_steps, Da)
            table = self.weight("action.timesteps", "table", c.diffusion_steps, Da, recipe=steps)
            self.step("action.timestep", "lookup", {"index": "timestep"}, at, weights={"table": table})
        if c.proprio_dim:
            self.projector("proprio_projector", "proprio", c.proprio_dim, Access(a, tokens=(T + E - 1, T + E)))
        self.stream = "vision"
        return a

    def projector(self, module: str, x: str, in_width: int, out: Access | None = None) -> str:
        """Linear, GELU, Linear."""
        Da = self.c.action_width
        h = self.linear(f"action.{module}.fc1", x, f"{module}.fc1", (Da, in_width))
        h = self.activation(f"action.{module}.gelu", h, "gelu")
        return self.linear(f"action.{module}.fc2", h, f"{module}.fc2", (Da, Da), out=out)

    def task_lookup(self) -> str:
        """The task embedding of each sample, (B, D)."""
        name = "action.task"
        if name not in self.buffers:
            c = self.c
            self.buffer(name, self.B, c.action_width)
            recipe = parameter("task_embedding.weight")
            table = self.weight("task_embedding.weight", "table", c.num_tasks, c.action_width, recipe=recipe)
            self.step(name, "lookup", {"index": "task_id"}, name, weights={"table": table})
        return name

    def task_vector(self) -> str:
        """What FiLM reads, "" without FiLM."""
        self.stream = "action"
        task = self.task_lookup() if self.c.task_conditioning == "film" else ""
        self.stream = "vision"
        return task

    def action_layer(self, layer: int, a: str, task: str, memory: Access) -> str:
        self.stream = "action"
        c, Da, T, E = self.c, self.c.action_width, self.c.num_action_tokens, self.c.num_extra_tokens
        name, own = f"action.{layer}", f"action_blocks.{layer}"
        shared = c.action_stream == "shared"
        block = f"vision_blocks.{layer}" if shared else own
        read = a
        if task:
            read = self.film(name, a, task, own)
            a = read if c.action_stream == "last_layer" else a
        n = self.norm(f"{name}.norm1", read, f"{block}.norm1", Da, c.norm_eps, self.tokens(f"{name}.norm1", a, Da))
        query, key_value = (f"{block}.qkv",) * 2 if shared else (f"{own}.query", f"{own}.key_value")
        shape = (3 * Da, Da) if shared else (Da, Da)
        q = self.linear(f"{name}.query", n, query, shape, (0, Da) if shared else None)
        inputs = {"q": Access(q), "kv": memory}
        if E:
            shape, rows = ((3 * Da, Da), (Da, 3 * Da)) if shared else ((2 * Da, Da), None)
            extra = self.linear(f"{name}.kv_extra", Access(n, tokens=(T, T + E)), key_value, shape, rows)
            inputs["kv_extra"] = Access(extra)
        options = {"heads": c.num_heads, "scale": c.action_attention_scale}
        out = self.tokens(f"{name}.attention", a, Da)
        self.step(f"{name}.attention", "cross_attention", inputs, out, options=options)
        ls1 = ls2 = None
        if c.action_layer_scale:
            owner = own if c.action_stream == "last_layer" else f"vision_blocks.{layer}"
            ls1, ls2 = f"{owner}.ls1", f"{owner}.ls2"
        h = self.linear(f"{name}.proj", out, f"{block}.proj", (Da, Da))
        a = self.residual(f"{name}.attended", a, h, ls1)
        gelu = c.vision_gelu if shared else "erf"
        a = self.mlp(name, a, block, Da, c.action_mlp_hidden, gelu, ls2)
        self.stream = "vision"
        return a

    def film(self, name: str, a: str, task: str, module: str) -> str:
        """FiLM of the stream, gamma and beta from the task embedding."""
        Da = self.c.action_width
        h = self.linear(f"{name}.film.fc1", task, f"{module}.film.fc1", (4 * Da, Da))
        h = self.activation(f"{name}.film.gelu", h, "gelu")
        h = self.linear(f"{name}.film.fc2", h, f"{module}.film.fc2", (2 * Da, 4 * Da))
        return self.step(f"{name}.film", "film", {"x": a, "gamma_beta": h}, self.tokens(f"{name}.film", a, Da))

    def head(self, a: str) -> None:
        self.stream = "action"
        c, Da, K = self.c, self.c.action_width, self.c.tokens_in_step
        x: Any = Access(a, tokens=(0, c.num_action_tokens)) if c.num_extra_tokens else a
        h = self.buffer("head.norm1", self.B, c.chunk_size, K * Da)
        self.norm(h, x, "head.norm1", K * Da, HEAD_EPS, h, group=K)
        h = self.activation("head.relu", self.linear("head.fc1", h, "head.fc1", (Da, K * Da)), "relu")
        for i in range(2):
            n = self.norm(
                f"head.{i}.norm", h, f"head.blocks.{i}.norm", Da, HEAD_EPS, self.tokens(f"head.{i}.norm", h, Da)
            )
            y = self.activation(
                f"head.{i}.relu", self.linear(f"head.{i}.fc", n, f"head.blocks.{i}.fc", (Da, Da)), "relu"
            )
            h = self.residual(f"head.{i}.out", h, y, None)
        h = self.norm("head.norm2", h, "head.norm2", Da, HEAD_EPS, self.tokens("head.norm2", h, Da))
        shape = (self.B, c.chunk_size, c.action_dim)
        if c.head == "diffusion":
            noise = self.linear("head.fc2", h, "head.fc2", (c.action_dim, Da))
            self.buffer("actions", *shape, dtype="fp32", role="output")
            self.step("head.ddim", "ddim", {"noise": noise, "sample": "sample", "timestep": "timestep"}, "actions")
        else:
            self.buffer("actions", *shape, role="output")
            self.linear("head.fc2", h, "head.fc2", (c.action_dim, Da), out="actions")
