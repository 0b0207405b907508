"""The Hugging Face architectures that models here can be exported to and imported from."""
