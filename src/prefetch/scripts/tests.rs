use std::collections::BTreeSet;
use std::process::Command;

use proptest::prelude::*;

use super::*;

fn text(names: Vec<Named>) -> Vec<String> {
    let text = |name| match name {
        Named::Path(path) => format!("={}", String::from_utf8(path).unwrap()),
        Named::Sought(path) => String::from_utf8(path).unwrap(),
    };
    names.into_iter().map(text).collect()
}

/// Files by their paths.
fn layer<'l>(paths: &'l [&'l str]) -> impl Fn(&[u8]) -> Option<&'l str> {
    let paths: BTreeSet<&str> = paths.iter().copied().collect();
    move |path| paths.get(std::str::from_utf8(path).ok()?).copied()
}

#[test]
fn languages_are_told_by_ending_and_first_line() {
    assert_eq!(Language::of(b"/a/b.rb", b""), Some(Language::Ruby));
    assert_eq!(
        Language::of(b"/usr/bin/x", b"#!/usr/bin/env ruby\n"),
        Some(Language::Ruby)
    );
    assert_eq!(
        Language::of(b"/usr/bin/x", b"#! /usr/bin/perl -w\n"),
        Some(Language::Perl)
    );
    assert_eq!(Language::of(b"/usr/bin/x", b"#!/bin/sh\nperl"), None);
    assert_eq!(
        Language::of(b"/etc/php/8.2/conf.d/a.ini", b""),
        Some(Language::PhpSettings)
    );
    assert_eq!(Language::of(b"/etc/a.ini", b""), None);
}

#[test]
fn what_ruby_requires_as_it_loads() {
    let script = b"require 'a/b'\nrequire(\"c.so\")\nmodule M\n  require_relative 'd'\n  def late\n    require 'not'\n  end\n  def one() = 1\n\
        \x20 begin\n    require 'e' # why\n  rescue LoadError\n  end\nend\n=begin\nrequire 'f'\n=end\nrequired 'g'\nrequire \"#{h}\"\n\
        load './i.rb'\n__END__\nrequire 'j'\n";
    assert_eq!(text(ruby::names(script)), ["a/b", "c.so", "=./d", "e", "=./i.rb"]);
}

#[test]
fn what_perl_uses_as_it_loads() {
    let script = b"#!perl\npackage A::B;\nuse v5.20;\nuse 5.004; use strict;\nuse List::Util qw(sum);\nBEGIN { require Exporter; }\n\
        use parent -norequire, 'No';\nuse base qw(X::Y\n  Z);\nrequire 'a/b.pl';\nsub late {\n  require Not;\n  use But;\n}\nsub one { 1 }\n\
        require C;\n\n=pod\n\nuse Pod;\n\n=cut\n\nXSLoader::load();\nno warnings;\n__END__\nuse D;\n";
    assert_eq!(
        text(perl::names(script)),
        [
            "List/Util.pm",
            "Exporter.pm",
            "parent.pm",
            "base.pm",
            "X/Y.pm",
            "Z.pm",
            "a/b.pl",
            "But.pm",
            "C.pm",
            "auto/A/B/B.so",
            "warnings.pm"
        ]
    );
}

#[test]
fn what_php_loads() {
    let script = b"<?php\nnamespace A\\B;\n\nuse X\\Y as Z;\nuse A\\{C, D\\E};\nuse function X\\f;\nrequire_once __DIR__ . '/..' . '/f.php';\n\
        require 'g.php';\ninclude $h;\nabstract class K extends L\n    implements \\M, N\n{\n    use T;\n}\n";
    let mut namespaces = Namespaces::default();
    let found = text(namespaces.names(b"/lib/A/B/K.php", script));
    assert_eq!(
        found,
        [
            "=/lib/X/Y.php",
            "=/lib/A/C.php",
            "=/lib/A/D/E.php",
            "=/lib/A/B/../f.php",
            "=/lib/A/B/g.php",
            "g.php",
            "=/lib/A/B/L.php",
            "=/lib/A/B/N.php",
            "=/lib/A/B/T.php"
        ]
    );
    let composer = b"    public static $files = array (\n\
        '0123456789abcdef0123456789abcdef' => __DIR__ . '/..' . '/p/bootstrap.php',\n );\n\
        'P\\\\Q\\\\' => \n array (\n 0 => __DIR__ . '/..' . '/p/q/src',\n ),\n'R\\\\Class' => __DIR__ . '/..' . '/r/class.php',\n";
    let found = text(namespaces.names(b"/app/vendor/composer/autoload_static.php", composer));
    assert_eq!(found, ["=/app/vendor/composer/../p/bootstrap.php"]);
    let found = text(namespaces.names(b"/app/x.php", b"<?php\nuse P\\Q\\S\\T;\n"));
    assert_eq!(found, ["=/app/vendor/composer/../p/q/src/S/T.php"]);
}

#[test]
fn settings_name_extensions() {
    let mut search = SearchPath::default();
    let settings = b"[PHP]\n; extension=not\nextension=dom.so\nextension = \"intl\"\nzend_extension=/opt/x.so ; why\nextension_dir = \"/usr/lib/php/x/\"\n";
    assert_eq!(
        text(php::extensions(settings, &mut search)),
        ["dom.so", "intl.so", "=/opt/x.so"]
    );
    let exists = layer(&["/usr/lib/php/x/dom.so"]);
    assert_eq!(
        search.find(b"/etc/php", b"dom.so", &[b""], &exists),
        Some("/usr/lib/php/x/dom.so")
    );
}

/// The search path is learned from directories above, and from what a reader turns to.
#[test]
fn the_search_path_is_learned() {
    let files = [
        "/r/lib/json/common.rb",
        "/r/lib/set.rb",
        "/arch/strscan.so",
        "/arch/json/ext.so",
        "/else/unrelated.so",
    ];
    let exists = layer(&files);
    let mut scripts = Scripts::default();
    let mut loads = |path: &[u8], script: &[u8]| scripts.loads(Language::Ruby, path, script, &exists);
    assert_eq!(
        loads(b"/r/lib/json.rb", b"require 'json/common'\nrequire 'json/ext'\n"),
        ["/r/lib/json/common.rb"]
    );
    assert_eq!(
        loads(b"/other/x.rb", b"require 'set'\nrequire 'strscan'\n"),
        ["/r/lib/set.rb"]
    );
    assert!(scripts.saw(b"/else/unrelated.so", &exists).is_empty());
    assert_eq!(scripts.saw(b"/arch/strscan.so", &exists), ["/arch/json/ext.so"]);
    assert!(scripts.saw(b"/arch/strscan.so", &exists).is_empty(), "it is known");
}

/// What this machine's Perl loads for a module is found from that module's text and from each file that is found by it, when a reader turns
/// to those that were looked for in vain.
#[test]
fn what_the_machines_perl_loads_is_found() {
    let script = "require Getopt::Long; require POSIX; require File::Temp; print \"$_\\n\" for sort values %INC";
    let output = Command::new("perl").args(["-e", script]).output();
    let Some(output) = output.ok().filter(|output| output.status.success()) else {
        eprintln!("SKIP: what_the_machines_perl_loads_is_found: no perl");
        return;
    };
    let loaded = String::from_utf8(output.stdout).unwrap();
    let loaded: BTreeSet<&str> = loaded.lines().filter(|path| path.starts_with('/')).collect();
    assert!(loaded.len() > 20, "{loaded:?}");
    let exists = |path: &[u8]| {
        let path = std::str::from_utf8(path).ok()?;
        std::path::Path::new(path).is_file().then(|| path.to_owned())
    };
    let mut scripts = Scripts::default();
    let mut found: BTreeSet<String> = BTreeSet::new();
    // Reads in the order of the paths, as a stand-in for some order; what was not foretold is turned to.
    let mut turned_to = 0;
    for path in &loaded {
        if found.insert((*path).to_owned()) {
            turned_to += 1;
        }
        let mut next = scripts.saw(path.as_bytes(), &exists);
        next.push((*path).to_owned());
        while let Some(path) = next.pop() {
            let bytes = std::fs::read(&path).unwrap();
            if Language::of(path.as_bytes(), &bytes) == Some(Language::Perl) {
                let named = scripts.loads(Language::Perl, path.as_bytes(), &bytes, &exists);
                next.extend(named.into_iter().filter(|path| found.insert(path.clone())));
            }
        }
    }
    assert!(
        turned_to * 2 < loaded.len(),
        "{turned_to} of {} were not foretold",
        loaded.len()
    );
    assert!(
        found.len() < loaded.len() * 2,
        "{} files for {}",
        found.len(),
        loaded.len()
    );
}

proptest! {
    #[test]
    fn no_text_does_harm(
        script in "(require|use |namespace |class |extends |def |end|sub |[\"'/.;:{}()=\\\\a-z \n]){0,300}",
        tail in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let bytes = [script.as_bytes(), &tail].concat();
        for language in [Language::Ruby, Language::Perl, Language::Php, Language::PhpSettings] {
            let mut scripts = Scripts::default();
            for path in [&b"/a/b"[..], b"/a/autoload_static.php"] {
                let found = scripts.loads(language, path, &bytes, &|path| Some(path.len()));
                prop_assert!(found.len() <= MOST_NAMES);
                prop_assert!(scripts.saw(b"/a/b/c", &|path| Some(path.len())).len() <= 10_000);
            }
        }
    }
}
