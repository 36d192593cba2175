"""``python -m retrieval_kd`` is the ``retrieval-kd`` command."""

from retrieval_kd.cli import main

if __name__ == "__main__":
    main()
