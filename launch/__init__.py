"""`python -m launch.NAME`, from the clone: the command of jaxmoe/commands/NAME.py."""
