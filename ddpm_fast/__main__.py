"""``python -m ddpm_fast``, the same as the ``ddpm-fast`` command (and what torchrun starts)."""

from .cli import main

if __name__ == "__main__":
    main()
