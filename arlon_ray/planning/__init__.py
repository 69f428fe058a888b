"""What stages cost before they are run: operations and bytes from the configuration, seconds from measured rates."""
