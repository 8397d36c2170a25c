//! Who uses a block device. In: a device. Out: the mounts and devices on top of it, as a person would look for them.
//!
//! Whether a device is in use at all the kernel knows best: mounts, swap and device-mapper claim it exclusively, in whatever
//! namespace they are, and a claim of our own then fails. Where it is in use has to be looked for, in `/proc`.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::ublk;

/// One use of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// Mounted here.
    Mount(PathBuf),
    /// Mounted in another mount namespace: where, and a process that sees it there.
    ForeignMount(PathBuf, u32),
    /// Another block device is built on it.
    Holder(String),
    /// The kernel says it is in use, and nothing shows by whom.
    Unknown,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount(at) => write!(f, "mounted on {}", at.display()),
            Self::ForeignMount(at, pid) => {
                write!(f, "mounted on {} in the mount namespace of process {pid}", at.display())
            }
            Self::Holder(name) => write!(f, "used by /dev/{name}"),
            Self::Unknown => {
                f.write_str("in use by the kernel (an overlay over it, a layer in this layer, another file in it that is open, or swap)")
            }
        }
    }
}

/// A line of `mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// The mount's number.
    pub id: u64,
    /// The number of the mount that it lies on.
    pub parent: u64,
    /// Whether what is mounted and undone on its like outside happens here too.
    pub follows: bool,
    /// The filesystem's device number, as `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// What is mounted there, as mount(8) was told.
    pub source: PathBuf,
    /// Whether nothing can be written through it.
    pub read_only: bool,
    /// The directories under an overlay, as they were named when it was mounted.
    pub lower: Vec<PathBuf>,
    /// The directory that an overlay writes to.
    pub upper: Option<PathBuf>,
}

impl MountLine {
    /// Whether `device`, which has this number, is what is seen there: itself, or an overlay of ours over it, whose source is the
    /// device.
    #[must_use]
    pub fn shows(&self, device: &Path, number: &str) -> bool {
        self.device == number || (self.upper.is_some() && self.source == device)
    }
}

/// The mounts that this process sees, in the order they were made.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn mounts() -> io::Result<Vec<MountLine>> {
    Ok(parse_mountinfo(&fs::read("/proc/self/mountinfo")?))
}

/// Whether something is mounted on a directory (a full path without links), found without touching what is mounted.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn is_mount_point(dir: &Path) -> io::Result<bool> {
    Ok(mounts()?.iter().any(|line| line.point == dir))
}

fn parse_mountinfo(text: &[u8]) -> Vec<MountLine> {
    let parse = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse::<u64>().ok();
        let (id, parent) = (number()?, number()?);
        let device = String::from_utf8(fields.next()?.to_vec()).ok()?;
        let point = unescape(fields.nth(1)?);
        let read_only = fields.next()?.split(|&byte| byte == b',').any(|option| option == b"ro");
        // Options, then optional fields up to a single dash, then the type and the source.
        let mut follows = false;
        fields.find(|field| {
            follows |= field.starts_with(b"master:");
            *field == b"-"
        })?;
        let source = unescape(fields.nth(1)?);
        let options = || fields.clone().next().unwrap_or_default().split(|&byte| byte == b',');
        let upper = options()
            .find_map(|option| option.strip_prefix(b"upperdir="))
            .map(unescape);
        let lower = options()
            .filter_map(|option| {
                option
                    .strip_prefix(b"lowerdir=")
                    .or_else(|| option.strip_prefix(b"lowerdir+="))
            })
            .flat_map(|dirs| dirs.split(|&byte| byte == b':'))
            .map(unescape)
            .collect();
        Some(MountLine {
            id,
            parent,
            follows,
            device,
            point,
            source,
            read_only,
            lower,
            upper,
        })
    };
    text.split(|&byte| byte == b'\n').filter_map(parse).collect()
}

/// `mountinfo` writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (*first, after) {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// A block device's number as `mountinfo` writes it.
///
/// # Errors
/// When there is no such device.
pub fn device_number(device: &Path) -> io::Result<String> {
    let number = fs::metadata(device)?.rdev();
    Ok(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number)))
}

/// Where `device` is mounted as far as this process sees.
#[must_use]
pub fn mount_points(device: &Path) -> Vec<PathBuf> {
    let Ok(number) = device_number(device) else {
        return Vec::new();
    };
    let lines = mounts().unwrap_or_default();
    lines
        .into_iter()
        .filter(|line| line.shows(device, &number))
        .map(|line| line.point)
        .collect()
}

/// Whether something has claimed `device` for itself: a mount in any namespace, swap, another device.
///
/// A ublk device is not opened for this. Opening and closing one waits, uninterruptibly, for a reader of it that was killed (its
/// own closing waits for its reads), and so for the server: without one for ever, and if the server asks and is killed itself,
/// it can never end, nor any of its devices be served again. Of a ublk device, claims that neither sysfs nor the mounts of any
/// process show are not seen: those of programs that open it exclusively.
///
/// # Errors
/// When the device cannot be opened for another reason.
pub fn is_claimed(device: &Path) -> io::Result<bool> {
    if shows_claim(device) {
        return Ok(true);
    }
    let ublk = device
        .to_str()
        .and_then(|path| path.strip_prefix("/dev/ublkb")?.parse().ok());
    if ublk.is_some_and(ublk::exists) {
        return Ok(!mount_points(device).is_empty() || !foreign_mounts(device).is_empty());
    }
    match OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(device)
    {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether sysfs shows that an ext4 filesystem on `device`, in whatever namespace and even where it was unmounted lazily, or
/// another device has claimed it. Cheap, and touches nothing, so it can be asked again and again: [`is_claimed`], which holds the
/// device itself for a moment, is for when this says no.
#[must_use]
pub fn shows_claim(device: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    let holders = fs::read_dir(Path::new("/sys/block").join(name).join("holders"));
    Path::new("/sys/fs/ext4").join(name).exists() || holders.into_iter().flatten().flatten().next().is_some()
}

/// Everything that uses `device`; empty when nothing does.
#[must_use]
pub fn of(device: &Path) -> Vec<User> {
    if !is_claimed(device).unwrap_or(false) {
        return Vec::new();
    }
    let mut users: Vec<User> = mount_points(device).into_iter().map(User::Mount).collect();
    if let Some(name) = device.file_name() {
        let holders = fs::read_dir(Path::new("/sys/block").join(name).join("holders"));
        users.extend(
            holders
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| User::Holder(entry.file_name().to_string_lossy().into_owned())),
        );
    }
    if users.is_empty() {
        users = foreign_mounts(device);
    }
    if users.is_empty() {
        users.push(User::Unknown);
    }
    users
}

/// A mount namespace, told apart from others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Namespace {
    /// As `/proc/PID/ns/mnt` names it.
    Link(PathBuf),
    /// By the number of a process's root mount, which no other namespace has: a confined process may not read that link of others.
    Root(u64),
}

/// The mount namespace that this process left for one of its own, by both its names.
static LEFT: OnceLock<[Option<Namespace>; 2]> = OnceLock::new();

/// Remembers the mount namespace that this process is about to leave. What is mounted there is then told like what is mounted
/// here: a person who reads the message is there.
pub(super) fn remember_namespace() {
    // A process leaves once.
    let _ = LEFT.set(names_of_own());
}

/// The names of this process's mount namespace.
fn names_of_own() -> [Option<Namespace>; 2] {
    let link = fs::read_link("/proc/self/ns/mnt").ok().map(Namespace::Link);
    let root = mounts().ok().and_then(|lines| root_of(&lines)).map(Namespace::Root);
    [link, root]
}

/// The number of the mount on `/`.
fn root_of(lines: &[MountLine]) -> Option<u64> {
    lines
        .iter()
        .find(|line| line.point == Path::new("/"))
        .map(|line| line.id)
}

/// Looks through the mount namespaces of all processes, each once.
fn foreign_mounts(device: &Path) -> Vec<User> {
    let Ok(number) = device_number(device) else {
        return Vec::new();
    };
    let mut seen: HashSet<Namespace> = names_of_own().into_iter().flatten().collect();
    let mut users = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let lines = || parse_mountinfo(&fs::read(entry.path().join("mountinfo")).unwrap_or_default());
        let (namespace, lines) = if let Ok(link) = fs::read_link(entry.path().join("ns/mnt")) {
            if seen.contains(&Namespace::Link(link.clone())) {
                continue;
            }
            (Namespace::Link(link), lines())
        } else {
            let lines = lines();
            let Some(root) = root_of(&lines) else { continue };
            (Namespace::Root(root), lines)
        };
        let was_ours = LEFT
            .get()
            .is_some_and(|names| names.iter().flatten().any(|name| *name == namespace));
        if !seen.insert(namespace) {
            continue;
        }
        let here = lines.into_iter().filter(|line| line.shows(device, &number));
        if was_ours {
            let ours: Vec<_> = here.map(|line| User::Mount(line.point)).collect();
            // Copies elsewhere say nothing more, as where this process sees the mount itself.
            if !ours.is_empty() {
                return ours;
            }
        } else {
            users.extend(here.map(|line| User::ForeignMount(line.point, pid)));
        }
    }
    users
}

/// Some of the processes that keep `mount_point` busy: number and name. Goes by the names of what they have open, because
/// looking at a file itself could wait for a device that does not answer.
#[must_use]
pub fn processes_below(mount_point: &Path) -> Vec<(u32, String)> {
    const ENOUGH: usize = 3;
    let on_it = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(mount_point));
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let process = entry.path();
        let mut links = vec![process.join("cwd"), process.join("root"), process.join("exe")];
        links.extend(
            fs::read_dir(process.join("fd"))
                .into_iter()
                .flatten()
                .flatten()
                .map(|fd| fd.path()),
        );
        if links.iter().any(|link| on_it(link)) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.push((pid, name.trim().to_owned()));
            if found.len() == ENOUGH {
                break;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_with_blanks_and_optional_fields() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw\n\
            37 35 7:3 / /a\\040b\\134c ro - ext4 /dev/loop3 ro\nnonsense\n\n38 35 7:4 / /x ro";
        let lines = parse_mountinfo(text);
        assert_eq!(lines.len(), 2);
        assert_eq!(
            (lines[0].device.as_str(), lines[0].point.to_str()),
            ("98:0", Some("/mnt2"))
        );
        assert_eq!(
            (lines[1].device.as_str(), lines[1].point.to_str()),
            ("7:3", Some("/a b\\c"))
        );
        assert_eq!(lines[1].source, Path::new("/dev/loop3"));
        assert_eq!((lines[0].read_only, lines[1].read_only), (false, true));
        assert_eq!((lines[0].id, lines[0].parent), (36, 35));
        assert_eq!((lines[0].follows, lines[1].follows), (true, false));
    }

    #[test]
    fn what_an_overlay_stands_on_is_told() {
        let text = b"40 35 0:40 / /merged ro - overlay none ro,lowerdir=/a\\040b:/layers/1,index=off";
        let lines = parse_mountinfo(text);
        assert_eq!(lines[0].lower, [Path::new("/a b"), Path::new("/layers/1")]);
        assert_eq!(lines[0].upper, None);
        let text =
            b"41 35 0:41 / /m rw - overlay /dev/loop3 rw,lowerdir=/u/lower,upperdir=/a\\054b/upper,workdir=/u/work";
        let line = &parse_mountinfo(text)[0];
        assert_eq!(line.upper.as_deref(), Some(Path::new("/a,b/upper")));
        assert!(line.shows(Path::new("/dev/loop3"), "7:3") && !line.shows(Path::new("/dev/loop4"), "7:4"));
    }

    #[test]
    fn the_root_is_mounted_and_busy() {
        assert!(mounts().unwrap().iter().any(|line| line.point == Path::new("/")));
    }

    #[test]
    fn a_process_that_has_a_file_open_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert!(processes_below(dir.path()).is_empty());
        let _open = fs::File::create(dir.path().join("file")).unwrap();
        assert!(
            processes_below(dir.path())
                .iter()
                .any(|(pid, _)| *pid == std::process::id())
        );
    }
}
