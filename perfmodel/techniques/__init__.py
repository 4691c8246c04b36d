"""Published changes to inference, each as a small edit of records. One file per kind; presets are YAML."""
