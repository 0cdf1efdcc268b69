"""Names of tests' models and files, which take no time to import."""

COMMON = (
    "vit",
    "vit-classifier",
    "deit",
    "deit-classifier",
    "dinov2",
    "dinov2-classifier",
    "registers",
    "registers-classifier",
    "clip",
    "clip-vision",
    "clip-projection",
    "clip-classifier",
)
"""Those of the families that most checkpoints are of, which tests go through that look at what families share."""

LONGEST = (
    "test_compile.py",
    "test_other_libraries.py",
    "test_real.py",
    "test_families.py",
    "test_transformers_shapes.py",
    "test_calibrate.py",
    "test_auto.py",
    "test_image_processing.py",
    "test_learning_together.py",
    "test_embedding.py",
    "test_pipeline.py",
    "test_serve.py",
    "test_data_loading.py",
    "test_kills.py",
    "test_packaged_words.py",
    "test_readme.py",
)
"""The files whose tests take longest, the longest first: the last ones that processes begin should be short."""
