"""What a video shows, measured: readings of rendered scenes, and metrics named after VBench's dimensions."""
