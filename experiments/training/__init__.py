"""The program behind ``train_maml.py``.

:mod:`.main` turns the command line into a :class:`.config.Config`, :mod:`.setup` builds the model, the tasks and the
learner from it, :mod:`.loop` trains, and :mod:`.evaluate` tests on held-out tasks. Beside them: :mod:`.checkpoint`
(files, with a digest), :mod:`.directory` (the output directory and its lock), :mod:`.state` (what a checkpoint
restores), :mod:`.metrics` and :mod:`.report` (metrics and plots), :mod:`.interrupts` (signals) and :mod:`.distributed`
(several processes).
"""
