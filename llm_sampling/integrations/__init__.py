"""The kernel inside other libraries, in a module each: Hugging Face transformers and vLLM."""
