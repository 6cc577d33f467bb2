"""Meta-train a Transformer: ``python train_maml.py --help``."""

from experiments.errors import require_train_extra

if __name__ == "__main__":
    require_train_extra()
    from experiments.training.main import main

    main()
