"""``python -m acam_kd.cli``, the same as ``acam-kd``."""

from . import main

if __name__ == "__main__":
    main()
