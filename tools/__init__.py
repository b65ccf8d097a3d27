"""What the Makefile and the tests need around the package: run as ``python -m tools.<name>`` from the checkout."""
