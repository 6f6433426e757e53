from jaxmoe.core.terminal import escaped


def test_a_terminal_gets_no_control_character_but_lines_and_tabs():
  assert escaped("a\x05b\x1b[2J\r\x7f\x9b\x00") == r"a\x05b\x1b[2J\x0d\x7f\x9b\x00"
  plain = "a\tb\n\u00e9 \u2603 \U0001f469\u200d\U0001f680"
  assert escaped(plain) == plain
