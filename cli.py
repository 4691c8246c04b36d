"""Run the command line from a checkout: ``python cli.py plan examples/azure-chat-70b.yaml``."""

from perfmodel.cli import main

if __name__ == "__main__":
    main()
