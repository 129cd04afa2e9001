"""What SP's step on Stable Diffusion 2.1 needs on TPU chips (2401.00110; batch 896), compiled.

    JAX_OPTIMIZATION_LEVEL=O1 python benchmarks/sd21_plan.py --on v5e:8x16 [--batch 896]
        [--plan sharded] [--remat] [--out FILE.json]

The U-Net of 2.1 predicts v; one evaluation, with its gradient, makes x0_hat and eps_hat, which a
frozen copy judges by its middle block at a second level beside the true pair. Adam, moving average,
gradients summed over all chips; text contexts come with the batch, so that no text encoder is in
it. bfloat16 compute on float32 weights. Prints what `train.py --plan-for` prints.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from ogdm_jax import config as configs
from ogdm_jax import parallel
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.networks import UNet2DCondition
from ogdm_jax.planning import chips, program, report

SIDE, CONTEXT = 64, (77, 1024)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Weights, their average, Adam's moments."""

    params: dict
    ema: dict
    moments: tuple


class Run:
    """What `program.compile_step` asks of a run."""

    def __init__(self, plan: parallel.Plan, batch: int, remat: bool) -> None:
        self.plan, self.batch = plan, batch
        self.network = UNet2DCondition(
            img_resolution=SIDE,
            heads=(5, 10, 20, 20),
            context_dim=CONTEXT[1],
            linear_projection=True,
            dtype=jnp.bfloat16,
            remat=remat,
        )
        self.adam = optax.adam(3e-5)
        self.table = Discrete.make("scaled_linear", 1000)

    def create(self, key: jax.Array) -> State:
        one = jnp.zeros((1, SIDE, SIDE, 4)), jnp.zeros((1,)), jnp.zeros((1, *CONTEXT))
        params = self.network.init(key, *one)["params"]
        return State(params, params, self.adam.init(params))

    def shapes(self):
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = self.plan.shapes(jax.eval_shape(self.create, key))
        struct, n = jax.ShapeDtypeStruct, self.batch
        images, step = struct((n, SIDE, SIDE, 4), jnp.float32), struct((n,), jnp.int32)
        batch = {"x0": images, "eps": images, "t": step, "next": step}
        batch["context"] = struct((n, *CONTEXT), jnp.float32)
        return state, {"whole": state.ema, "divided": {}}, batch, key

    def compile(self, state):
        return self.plan.compile(self.step, state)

    def step(self, state, constants, batch, key):
        alpha = jnp.asarray(self.table.alpha_bar, jnp.float32)
        scales = lambda t: [jnp.sqrt(v)[:, None, None, None] for v in (alpha[t], 1 - alpha[t])]
        teacher = {"params": constants["whole"]}
        x0, eps, context = batch["x0"], batch["eps"], batch["context"]
        told = lambda t: t.astype(jnp.float32)

        def loss(params):
            a, s = scales(batch["t"])
            xt = a * x0 + s * eps
            v = self.network.apply({"params": params}, xt, told(batch["t"]), context)
            x0_hat, eps_hat = a * xt - s * v, s * xt + a * v
            a, s = scales(batch["next"])
            judge = lambda x: self.network.apply(
                teacher, x, told(batch["next"]), context, at="mid", method="features"
            ).astype(jnp.float32)
            real = jax.lax.stop_gradient(judge(a * x0 + s * eps))
            return jnp.mean(jnp.square(judge(a * x0_hat + s * eps_hat) - real))

        value, gradient = jax.value_and_grad(loss)(self.plan.gather(state.params))
        moves, moments = self.adam.update(self.plan.scatter(gradient), state.moments)
        params = optax.apply_updates(state.params, moves)
        ema = jax.tree.map(lambda e, p: 0.9995 * e + 0.0005 * p, state.ema, params)
        return State(params, ema, moments), value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on", default="v5e:8x16")
    parser.add_argument("--batch", type=int, default=896)
    parser.add_argument("--plan", default="sharded", choices=("mesh", "sharded"))
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chip, devices = chips.topology(args.on)
    run = Run(parallel.plan_of(args.plan, devices), args.batch, args.remat)
    found = program.compile_step(run)
    settings = [f"data.batch={args.batch}", f"parallel.plan={args.plan}"]
    settings += ["train.duration=50000 steps"]
    config = configs.load(Path(__file__).parent.parent / "configs" / "base.py", settings)
    name = "sd21_sp (its step alone)" + (", remat" if args.remat else "")
    memory = chips.memory(chip, devices)
    plan = report.figures(config, found, chip, len(devices), memory, name)
    print(report.text(plan))
    if args.out:
        args.out.write_text(json.dumps(plan, indent=1) + "\n")


if __name__ == "__main__":
    main()
