"""The training problems that arms are compared on."""
