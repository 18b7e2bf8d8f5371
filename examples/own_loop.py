"""A training loop of one's own: python examples/own_loop.py smooth|plain RECIPE [key=value ...]"""

import sys
from contextlib import closing
from functools import partial

import jax

import jllama.train as jt


def smoothed_loss(config, trainable, frozen, batch, key):
    logits, targets, weights = jt.causal_lm_logits(config, trainable, frozen, batch, key)
    log_p = jax.nn.log_softmax(logits)
    nll = -jax.numpy.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    loss = 0.9 * nll - 0.1 * log_p.mean(-1)  # spreads a tenth of each target over the vocabulary
    return (loss * weights).sum(), weights.sum(), {"nll_sum": (nll * weights).sum()}


def main(loss_name, recipe, *overrides):
    config = jt.load_recipe(recipe, overrides)
    jt.start_processes(config.distributed)
    loss = partial(smoothed_loss if loss_name == "smooth" else jt.causal_lm_loss, config)
    placed = jt.make_placement(config)
    definition = jt.define_state(config, placed)
    train_step = jt.make_train_step(config, loss, definition, placed)
    state = jt.init_state(definition, config.run.seed)
    with jt.open_run(config) as (folder, data), closing(jt.Checkpoints(folder, 2)) as checkpoints:
        batches = jt.Batches(config, data, placed)
        for t in range(config.training.steps):
            state, metrics = train_step(state, (), batches(t))
            if (t + 1) % config.run.log_every == 0:
                print(f"step {t + 1}  loss {metrics['loss']:.4f}")
        eval_step = jt.make_eval_step(config, loss, placed)
        print(jt.evaluate(config, data, placed, eval_step, state.trainable))
        checkpoints.save(config.training.steps, **jt.to_trees(state))


if __name__ == "__main__":
    main(*sys.argv[1:])
