"""Test your own parts of a training run on a few CPU ranks.

:mod:`~moe_train.testing.runs` trains with overrides and callbacks and returns the metrics;
:mod:`~moe_train.testing.compare` compares the curves of two runs; the layouts and small models to
run are in :mod:`~moe_train.testing.layouts`; :mod:`~moe_train.testing.world` calls any function on
forked ranks, whose imports :mod:`~moe_train.testing.preload` makes once. Ranks are processes: what
they use has to be importable by name, so define it at module level.

A callback, on two ranks::

    class Losses(moe_train.Callback):
        def on_step(self, event):
            print(event.step, event.record["loss"])

    def test_losses(tmp_path):
        run = train_run(tmp_path / "run", [*SMALL, *EP2.overrides], 2, callbacks=[Losses()])
        assert run.codes == [0, 0]
        assert "20 " in (tmp_path / "run.log").read_text()

A token dispatcher of yours against Megatron's, in the layout that it is for::

    def test_dispatcher(tmp_path):
        runs = Runs(tmp_path, SMALL)
        mine = runs.get(EP2, "parallel.dispatcher=mine")
        assert compare(mine, runs.get(EP2)).within(), str(compare(mine, runs.get(EP2)))
"""
