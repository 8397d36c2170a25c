//! Names of an image: its users, groups and programs. In: the directory on which it is mounted. Out: numbers, and whether a program is
//! there.
//!
//! An image's files may be links, pipes, or without end: every path is resolved inside the image's root by the kernel, only regular files
//! are read, and of those only so much.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};

use super::{ContainerError, failed};

/// So much of a file with users or groups is read, in bytes.
const LONGEST: u64 = 4 << 20;

/// So many groups a process is in at most.
const MOST_GROUPS: usize = 1024;

/// Whoever may execute a file.
const EXECUTABLE: u32 = 0o111;

/// The root directory of an image.
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

impl Root {
    /// The one that is mounted on `path`.
    ///
    /// # Errors
    /// [`ContainerError::Io`].
    pub(super) fn open(path: &Path) -> Result<Self, ContainerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        Ok(Self(opened.map_err(|error| failed("open", path)(error.into()))?))
    }

    /// Opens a path as the image has it: links lead nowhere outside.
    fn open_at(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(
            &self.0,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )?)
    }

    /// The text of a regular file; nothing if there is none, or it cannot be read.
    fn text(&self, path: &str) -> String {
        let read = || -> io::Result<String> {
            // A pipe is not waited for.
            let fd = self.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
            if !is_file(&rustix::fs::fstat(&fd)?) {
                return Err(io::Error::other("not a regular file"));
            }
            let mut bytes = Vec::new();
            File::from(fd).take(LONGEST).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| {
            log::info!("the image's {path}: {error}");
            String::new()
        })
    }

    /// Makes sure that `program` is there and may be executed: a path from `workdir`, or a name that is looked for in `path`.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`], [`ContainerError::NotExecutable`].
    pub(super) fn check_program(&self, program: &str, path: &str, workdir: &str) -> Result<(), ContainerError> {
        let places: Vec<String> = if program.starts_with('/') {
            vec![program.to_owned()]
        } else if program.contains('/') {
            vec![format!("{workdir}/{program}")]
        } else {
            path.split(':').map(|dir| format!("{dir}/{program}")).collect()
        };
        let stats: Vec<Stat> = places
            .iter()
            .filter_map(|place| rustix::fs::fstat(self.open_at(place, OFlags::PATH).ok()?).ok())
            .collect();
        if stats.iter().any(|stat| is_file(stat) && stat.st_mode & EXECUTABLE != 0) {
            Ok(())
        } else if stats.is_empty() {
            Err(ContainerError::NotFound(program.to_owned()))
        } else {
            Err(ContainerError::NotExecutable(program.to_owned()))
        }
    }
}

fn is_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

/// Who runs a container's program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The other groups that the user is in.
    pub(super) groups: Vec<u32>,
    /// The home directory.
    pub(super) home: String,
}

/// A line of /etc/passwd.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1).unwrap_or_default();
        Some(Account { name, uid, gid, home })
    })
}

/// Names, numbers and members of /etc/group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        Some((name, fields.nth(1)?.parse().ok()?, fields.next().unwrap_or_default()))
    })
}

impl User {
    /// Who `wanted` is in the image: `USER[:GROUP]`, each a name or a number; root if nothing is said. A number need not have a name.
    /// Other groups are those that list the user, if no group is said.
    ///
    /// # Errors
    /// [`ContainerError::Settings`] when the image has no such user or group.
    pub(super) fn find(root: &Root, wanted: &str) -> Result<Self, ContainerError> {
        let (name, group) = match wanted.split_once(':') {
            Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
            None => (wanted, None),
        };
        let unknown = |what: &str, name: &str| {
            let name = name.escape_debug();
            ContainerError::Settings(format!("the image has no {what} {name:.100}; a number needs no name"))
        };
        let passwd = root.text("/etc/passwd");
        let number = if name.is_empty() {
            Some(0)
        } else {
            name.parse::<u32>().ok()
        };
        let account = accounts(&passwd).find(|account| account.name == name || Some(account.uid) == number);
        let uid = account.as_ref().map(|account| account.uid).or(number);
        let uid = uid.ok_or_else(|| unknown("user", name))?;
        // The kernel takes this one for none.
        if uid == u32::MAX {
            return Err(unknown("user", name));
        }
        let file = root.text("/etc/group");
        let mut user = Self {
            uid,
            gid: account.as_ref().map_or(0, |account| account.gid),
            groups: Vec::new(),
            home: account.as_ref().map_or("", |account| account.home).to_owned(),
        };
        if user.home.is_empty() {
            "/".clone_into(&mut user.home);
        }
        if let Some(group) = group {
            let number = group.parse::<u32>().ok();
            let named = groups(&file).find(|(name, ..)| *name == group).map(|(_, gid, _)| gid);
            user.gid = named
                .or(number)
                .filter(|gid| *gid != u32::MAX)
                .ok_or_else(|| unknown("group", group))?;
        } else if let Some(account) = account {
            let lists = |members: &str| members.split(',').any(|member| member == account.name);
            let others = groups(&file).filter(|(_, gid, members)| lists(members) && *gid != user.gid);
            user.groups = others.map(|(_, gid, _)| gid).take(MOST_GROUPS).collect();
        }
        Ok(user)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn image() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        fs::create_dir_all(dir.path().join("bin")).unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/sh\n#\n\nbad:x:y:z:\nweb:x:1000:1001:,,,:/srv:/bin/sh\nnohome:x:7:8\n";
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nstaff:x:1001:web\naudio:x:29:web,other\nlogs:x:40:other,web\nbad:x::web\n";
        fs::write(dir.path().join("etc/group"), group).unwrap();
        dir
    }

    fn find(dir: &Path, wanted: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        let found = User::find(&Root::open(dir).unwrap(), wanted).map_err(|error| error.to_string())?;
        Ok((found.uid, found.gid, found.groups, found.home))
    }

    #[test]
    fn users_are_names_or_numbers() {
        let dir = image();
        for (wanted, uid, gid, groups, home) in [
            ("", 0, 0, vec![], "/root"),
            ("root", 0, 0, vec![], "/root"),
            ("web", 1000, 1001, vec![29, 40], "/srv"),
            ("1000", 1000, 1001, vec![29, 40], "/srv"),
            ("web:", 1000, 1001, vec![29, 40], "/srv"),
            ("web:audio", 1000, 29, vec![], "/srv"),
            ("web:77", 1000, 77, vec![], "/srv"),
            ("4711", 4711, 0, vec![], "/"),
            ("4711:logs", 4711, 40, vec![], "/"),
            (":logs", 0, 40, vec![], "/root"),
            ("nohome", 7, 8, vec![], "/"),
        ] {
            assert_eq!(
                find(dir.path(), wanted),
                Ok((uid, gid, groups, home.to_owned())),
                "{wanted}"
            );
        }
        for wanted in [
            "nobody",
            "web:none",
            "-1",
            "4294967295",
            "4294967296",
            "bad",
            "\u{1b}[31m",
            "a\nb",
        ] {
            let error = find(dir.path(), wanted).unwrap_err();
            assert!(
                error.starts_with("the image has no") && !error.contains(['\u{1b}', '\n']),
                "{error}"
            );
        }
    }

    #[test]
    fn nothing_outside_of_the_image_is_read() {
        let dir = image();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("passwd"), "evil:x:0:0::/:\n").unwrap();
        let passwd = dir.path().join("etc/passwd");
        for target in [
            outside.path().join("passwd"),
            Path::new("../../../..").join(outside.path().join("passwd").strip_prefix("/").unwrap()),
        ] {
            fs::remove_file(&passwd).unwrap();
            symlink(&target, &passwd).unwrap();
            assert!(find(dir.path(), "evil").is_err(), "{}", target.display());
            assert_eq!(find(dir.path(), "5").unwrap().0, 5);
        }
        fs::remove_file(&passwd).unwrap();
        // One that leads on inside is followed.
        fs::write(dir.path().join("real"), "in:x:3:4::/in:\n").unwrap();
        symlink("/real", &passwd).unwrap();
        assert_eq!(find(dir.path(), "in").unwrap().0, 3);
        // A pipe is not waited for.
        fs::remove_file(&passwd).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &passwd, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(find(dir.path(), "9").unwrap().0, 9);
    }

    #[test]
    fn programs_are_looked_for_in_the_image() {
        let dir = image();
        let root = Root::open(dir.path()).unwrap();
        let add = |name: &str, mode: u32| {
            fs::write(dir.path().join(name), "").unwrap();
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        add("bin/tool", 0o755);
        add("bin/text", 0o644);
        symlink("/bin/tool", dir.path().join("bin/link")).unwrap();
        symlink("/usr/bin/env", dir.path().join("bin/out")).unwrap();
        let check = |program: &str| {
            root.check_program(program, "/sbin:/bin", "/etc")
                .map_err(|error| error.status())
        };
        for good in ["tool", "/bin/tool", "../bin/tool", "link"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for (bad, status) in [
            ("none", 127),
            ("/bin/none", 127),
            ("out", 127),
            ("./tool", 127),
            ("text", 126),
            ("/bin", 126),
        ] {
            assert_eq!(check(bad), Err(Some(status)), "{bad}");
        }
    }
}
