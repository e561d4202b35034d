
function Stop-Step([int]$status, [string]$why) {
  $e = [System.Exception]::new($why)
  $e.Data['status'] = $status
  throw $e
}
function Test-File([string]$path) { return [System.IO.File]::Exists($path) }
function Get-Tree([string]$stage, [string]$path) {
  return [System.IO.Path]::Combine($RUN, $stage, $path.Replace(':', ''))
}
function Get-Parts([string]$item) {
  $i = $item.IndexOf(':')
  return @($item.Substring(0, $i), $item.Substring($i + 1))
}
function Get-Text([string]$path) {
  if (-not (Test-File $path)) { return '' }
  return [System.IO.File]::ReadAllText($path)
}
function Get-BytesHash([byte[]]$bytes) {
  $sha = [System.Security.Cryptography.SHA256]::Create()
  try { return [System.BitConverter]::ToString($sha.ComputeHash($bytes)).Replace('-', '') } finally { $sha.Dispose() }
}

'now=' + [DateTimeOffset]::UtcNow.ToUnixTimeSeconds()
if ($PSVersionTable.PSVersion -ge [Version]'5.1') { 'tool=powershell-5.1' }
if (Test-File ([System.IO.Path]::Combine([Environment]::SystemDirectory, 'icacls.exe'))) { 'tool=icacls' }
$me = [System.Security.Principal.WindowsPrincipal]::new([System.Security.Principal.WindowsIdentity]::GetCurrent())
if ($me.IsInRole([System.Security.Principal.WindowsBuiltInRole]::Administrator)) { 'tool=administrator' }
'free=' + [long]([System.IO.DriveInfo]::new($argv[0].Substring(0, 1)).AvailableFreeSpace / 1024)
