"""Search spaces in words and short names."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_lightning.tune.space import describe, short_key, size


def test_distributions_in_words():
    assert describe(IntDistribution(32, 512, step=32)) == "32 to 512, step 32"
    assert describe(FloatDistribution(1e-4, 0.1, log=True)) == "0.0001 to 0.1, logarithmic"
    assert describe(CategoricalDistribution([None, True, 0.1, "torch.optim.Adam"])) == "one of None, True, 0.1, Adam"


def test_short_keys_are_what_the_config_s_nesting_leaves():
    keys = ["model.network.init_args.units.0", "model.optimizer.class_path", "data.batch_size", "model.optimizer"]
    assert list(map(short_key, keys)) == ["units.0", "optimizer", "batch_size", "optimizer"]
    assert short_key("model.network.class_path") == "network"
    assert short_key("model.optimizer.init_args.lr") == "optimizer.lr"


def test_the_size_of_a_space():
    space = {"a": IntDistribution(32, 512, step=32), "b": CategoricalDistribution([1, 2, 3])}
    assert size(space) == 16 * 3
    assert size({**space, "c": FloatDistribution(0.1, 0.5, step=0.1)}) == 16 * 3 * 5
    assert size({**space, "c": FloatDistribution(0.1, 0.5)}) == float("inf")
