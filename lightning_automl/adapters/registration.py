"""Make a fine-tuning method known to peft, so that its functions inject, save, switch and load it."""

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def register(name: str, config: type[PeftConfig], model: type[BaseTuner], prefix: str) -> None:
    """Register a method with peft under the type ``name.upper()``.

    ``register_peft_method`` accepts only names that are members of the ``PeftType`` enumeration, and an enumeration is
    closed once defined (peft 0.21). The member is therefore added by hand first; a test guards this on the installed
    peft. Files of the method are readable by peft after the module that calls this was imported, and never without it.

    Args:
        name: Lower case, without a trailing underscore, such as ``"image_lora"``.
        config: Its configuration; ``peft_type`` is the new member.
        model: Its tuner.
        prefix: What the names of the adapter's parameters start with, such as ``"lora_"``; that of ``model``.

    Raises:
        KeyError: If peft has a method of this name already.
    """
    member_name = name.upper()
    if member_name not in PeftType.__members__:
        member = str.__new__(PeftType, member_name)
        member._name_ = member_name
        member._value_ = member_name
        setattr(PeftType, member_name, member)  # before the maps: an enumeration refuses to set the name of a member
        PeftType._member_map_[member_name] = member
        PeftType._value2member_map_[member_name] = member
        PeftType._member_names_.append(member_name)
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=prefix)
