"""Documentation pages become the text a reader sees, without the navigation around it."""

from scone.model_store.plain_text import html_text, man_text, pod_text


def test_html_keeps_the_main_part_only() -> None:
    page = """<html><head><title>t</title></head><body><nav>menu <b>of</b> links</nav>
    <div class="document"><div class="body" role="main"><h1>Title<a class="headerlink" href="#x">¶</a></h1>
    <p>One   two\nthree&nbsp;&amp; four.</p><div class="toc"><div>inner</div>contents</div>
    <script>var x = "<p>no</p>";</script><p>Last.</p></div></div>
    <footer>built with</footer></body></html>"""
    assert html_text(page) == "Title\n\nOne two three & four.\n\nLast.\n"


def test_html_keeps_line_breaks_of_code_and_structure_of_lists_and_tables() -> None:
    page = """<body><p>See:<pre>if x:\n    <span class="k">pass</span>\n</pre>
    <ul><li>one<li><p>two</p></ul><table><tr><th>Name</th><th><p>Type</p></th></tr><tr><td>a</td><td>b</table>"""
    assert html_text(page) == "See:\n\nif x:\n    pass\n\n- one\n- two\n\nName\nType\n\na  b\n"


def test_html_skips_an_element_whose_children_are_left_open() -> None:
    page = '<body><div class="nosearch"><div><p>a<li>b</div><ul><li>c</ul></div><p>kept</body>'
    assert html_text(page) == "kept\n"


def test_pod_keeps_text_and_code_and_resolves_formatting() -> None:
    pod = """=head1 NAME X<index>

B<A I<nested> word>, C<< $a->{b} >>, L<the page|perlref/"Use">, E<lt>tagE<gt> and
a second line.

    my $x = 1;   # kept as it is

=begin html

<b>dropped</b>

=end html

=over

=item first

=item *

A bullet.

=back

=cut

sub not_documentation { }
"""
    assert pod_text(pod) == (
        "NAME\n\nA nested word, $a->{b}, the page, <tag> and a second line.\n\n"
        "    my $x = 1;   # kept as it is\n\nfirst\n\nA bullet.\n"
    )


def test_man_keeps_text_and_code_and_drops_its_preamble() -> None:
    page = r'''.de Sp
junk
..
.SH NAME
Carp \- warn
.SH "USING ""IT"""
.IX Header "X"
Call \f(CW\*(C`die()\*(C'\fR \fInow\fR,
says \s-1PERL5\s0.
.Vb 2
\&    carp "We\*(Aqre out";
\&    two\en;
.Ve
.IP "1." 4
First\|.
.PP
Last.
'''
    assert man_text(page) == (
        'NAME\n\nCarp - warn\n\nUSING "IT"\n\nCall die() now, says PERL5.\n\n'
        '    carp "We\'re out";\n    two\\n;\n\n1.\nFirst.\n\nLast.\n'
    )
