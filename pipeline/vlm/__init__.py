"""Vision-language models as encoders: messages, instructions, the model's hidden states. Torch only, no Ray.

A `message.Message` (text and images in any order) goes through a `templates.Template` and the `preparer.Preparer` to one
row of tensors; `backbone.Backbone` makes hidden states of rows, and `reading.read` one vector of each.
"""
