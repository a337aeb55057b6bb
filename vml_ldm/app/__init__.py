"""The web page behind ``vml-ldm app``; needs gradio."""
